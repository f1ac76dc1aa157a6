"""Transfer: carries the planner's transfers out, in lanes, bounded and by urgency."""
