"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const names = [...new Set([...data.policies, "lru", "optimum"])];
  const dashes = ["", "", "", "8 3", "8 3", "8 3"];
  const marks = ["circle", "square", "triangle"];
  let drawn = 0;
  const looks = new Map(names.map((name) => {
    if (name === "lru") return [name, { color: "var(--lru)", dash: "", mark: "", label: "LRU" }];
    if (name === "optimum") {
      return [name, { color: "var(--optimum)", dash: "5 4", mark: "", label: "optimum" }];
    }
    const at = drawn++;
    return [name, { color: `var(--c${at % 6})`, dash: dashes[at % 6], mark: marks[at % 3],
      label: name }];
  }));

  const svg = (kind, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const html = (kind, className, text) => {
    const node = document.createElement(kind);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const percent = (value, digits = 1) =>
    value === null ? "–" : `${(100 * value).toFixed(digits).replace("-", "−")} %`;
  const clock = (seconds) => {
    const whole = Math.round(seconds);
    const two = (n) => String(n).padStart(2, "0");
    return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  };

  const mark = (kind, x, y, color) => {
    if (kind === "square") {
      return svg("rect", { x: x - 3.5, y: y - 3.5, width: 7, height: 7, fill: color });
    }
    if (kind === "triangle") {
      return svg("path", { d: `M${x} ${y - 4.5}l4.5 8h-9z`, fill: color });
    }
    return svg("circle", { cx: x, cy: y, r: kind ? 4 : 2.5, fill: color });
  };

  const key = (parent) => {
    const list = html("ul", "key");
    for (const name of names) {
      const look = looks.get(name);
      const item = html("li");
      const sample = svg("svg", { viewBox: "0 0 28 12", "aria-hidden": "true" });
      sample.append(svg("path", { class: "series", d: "M0 6H28", stroke: look.color,
        "stroke-dasharray": look.dash }));
      if (look.mark) sample.append(mark(look.mark, 14, 6, look.color));
      item.append(sample, look.label);
      list.append(item);
    }
    parent.append(list);
  };

  const frame = (parent, label, ceiling) => {
    const width = Math.max(280, Math.min(860, parent.clientWidth || 860));
    const height = width < 520 ? 240 : 330;
    const box = { left: 44, right: width - 12, top: 10, bottom: height - 40 };
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    const y = (value) => box.bottom - (value / ceiling) * (box.bottom - box.top);
    const step = ceiling > 0.5 ? 0.2 : ceiling > 0.2 ? 0.1 : 0.05;
    for (let value = 0; value <= ceiling + 1e-9; value += step) {
      root.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value),
        y2: y(value) }));
      root.append(svg("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" },
        `${Math.round(100 * value)} %`));
    }
    parent.append(root);
    return { root, box, y, width, height };
  };
  const roundUp = (value) => Math.min(1, Math.max(0.1, Math.ceil(10 * value) / 10));

  const drawSizes = () => {
    const parent = document.getElementById("sizes");
    parent.replaceChildren();
    key(parent);
    const highest = Math.max(data.reachable, ...names.flatMap((name) => data.hits[name]));
    const { root, box, y, width, height } = frame(parent, "Hit ratio by size, one line for each policy",
      roundUp(highest));
    const order = data.sizes.map((size, at) => at).sort((a, b) =>
      data.sizes[a].blocks - data.sizes[b].blocks);
    const logs = order.map((at) => Math.log(data.sizes[at].blocks));
    const low = logs[0], span = logs[logs.length - 1] - low;
    const x = (place) => span > 0
      ? box.left + 24 + ((logs[place] - low) / span) * (box.right - box.left - 48)
      : (box.left + box.right) / 2;
    root.append(svg("line", { class: "series", x1: box.left, x2: box.right, y1: y(data.reachable),
      y2: y(data.reachable), stroke: "var(--soft)", "stroke-dasharray": "1 5" }));
    let last = -99;
    order.forEach((at, place) => {
      if (x(place) - last < 44) return;
      last = x(place);
      root.append(svg("text", { x: last, y: box.bottom + 17, "text-anchor": "middle" },
        `${Number((100 * data.sizes[at].share).toPrecision(2))} %`));
    });
    root.append(svg("text", { x: (box.left + box.right) / 2, y: height - 5,
      "text-anchor": "middle" }, width < 520 ? "size, % of the trace's blocks (log scale)"
      : "size, as a share of the trace's unique blocks (log scale)"));
    for (const name of [...names].reverse()) {
      const look = looks.get(name);
      const points = order.map((at, place) => [x(place), y(data.hits[name][at]), at]);
      root.append(svg("path", { class: "series", stroke: look.color, "stroke-dasharray": look.dash,
        d: "M" + points.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L") }));
      for (const [a, b, at] of points) {
        const dot = mark(look.mark, a, b, look.color);
        dot.append(svg("title", {}, `${look.label}, ${data.sizes[at].label}: ` +
          percent(data.hits[name][at], 2)));
        root.append(dot);
      }
    }
  };

  const drawGaps = () => {
    const parent = document.getElementById("gaps");
    const values = data.gaps.map((cell) => cell.gap_closed ?? 0);
    const low = Math.max(-1, Math.min(0, ...values));
    const high = Math.max(0.1, ...values) - low;
    data.sizes.forEach((size) => {
      parent.append(html("h3", "", size.label));
      for (const cell of data.gaps.filter((one) => one.blocks === size.blocks)) {
        const value = cell.gap_closed;
        const track = html("span", "track");
        const shown = Math.max(low, value ?? 0);
        const fill = html("span", "fill");
        fill.style.left = `${(100 * (Math.min(0, shown) - low)) / high}%`;
        fill.style.width = `${(100 * Math.abs(shown)) / high}%`;
        fill.style.background = looks.get(cell.policy).color;
        const zero = html("span", "zero");
        zero.style.left = `${(-100 * low) / high}%`;
        track.append(fill, zero);
        parent.append(html("span", "", looks.get(cell.policy).label), track,
          html("span", "value", percent(value)));
      }
    });
  };

  const scrub = document.getElementById("scrub");
  const pick = html("select");
  const when = (bin) => (bin * data.duration) / data.bins;
  let move = () => {};

  const drawTime = () => {
    const parent = document.getElementById("time");
    const at = Number(pick.value);
    parent.replaceChildren();
    key(parent);
    const { root, box, y, width, height } = frame(parent,
      "Hit ratio over time, one line for each policy", 1);
    scrub.style.marginLeft = `${box.left - 8}px`;
    scrub.style.width = `${box.right - box.left + 16}px`;
    const x = (bin) => box.left + (bin / data.bins) * (box.right - box.left);
    const [from, to] = data.scoredSpan.map((share) => box.left + share * (box.right - box.left));
    root.prepend(svg("rect", { class: "shade", x: from, width: Math.max(0, to - from), y: box.top,
      height: box.bottom - box.top }));
    for (let part = 0; part <= 4; part += width < 520 ? 2 : 1) {
      root.append(svg("text", { x: x((part * data.bins) / 4), y: box.bottom + 17,
        "text-anchor": part === 0 ? "start" : part === 4 ? "end" : "middle" },
      clock(when((part * data.bins) / 4))));
    }
    root.append(svg("text", { x: (box.left + box.right) / 2, y: height - 5,
      "text-anchor": "middle" }, "time in the trace, h:mm:ss"));
    for (const name of [...names].reverse()) {
      let path = "", pen = "M";
      data.timelines[name][at].forEach((value, bin) => {
        if (value === null) { pen = "M"; return; }
        path += `${pen}${x(bin + 0.5).toFixed(1)} ${y(value / 1000).toFixed(1)}`;
        pen = "L";
      });
      const look = looks.get(name);
      root.append(svg("path", { class: "series", d: path, stroke: look.color,
        "stroke-dasharray": look.dash, style: "stroke-width:1.5" }));
    }
    const cursor = svg("line", { class: "cursor", y1: box.top, y2: box.bottom });
    root.append(cursor);
    move = () => {
      const bin = Number(scrub.value);
      cursor.setAttribute("x1", x(bin + 0.5));
      cursor.setAttribute("x2", x(bin + 0.5));
      scrub.setAttribute("aria-valuetext", clock(when(bin)));
      const reading = document.getElementById("reading");
      reading.replaceChildren(html("span", "when", `${clock(when(bin))} to ${clock(when(bin + 1))}`));
      for (const name of names) {
        const value = data.timelines[name][at][bin];
        const one = html("span", "one", looks.get(name).label);
        one.append(html("span", "", percent(value === null ? null : value / 1000)));
        reading.append(one);
      }
    };
    const point = (event) => {
      const bounds = root.getBoundingClientRect();
      const place = ((event.clientX - bounds.left) / bounds.width) * root.viewBox.baseVal.width;
      const bin = Math.floor(((place - box.left) / (box.right - box.left)) * data.bins);
      scrub.value = Math.max(0, Math.min(data.bins - 1, bin));
      move();
    };
    root.addEventListener("pointermove", point);
    root.addEventListener("pointerdown", point);
    move();
  };

  const picker = document.getElementById("picker");
  const label = html("label", "", "Size");
  label.htmlFor = pick.id = "size";
  data.sizes.forEach((size, at) => {
    const option = html("option", "", size.label);
    option.value = at;
    pick.append(option);
  });
  picker.append(label, pick);
  scrub.max = data.bins - 1;
  scrub.value = Math.floor(data.bins / 2);
  scrub.addEventListener("input", () => move());
  pick.addEventListener("change", drawTime);
  drawGaps();
  let width = 0;
  const redraw = () => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    drawSizes();
    drawTime();
  };
  window.addEventListener("resize", redraw);
  redraw();
})();
