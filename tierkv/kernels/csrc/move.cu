// Moves blocks of K and V between two arrangements of memory: see tierkv/kernels/relayout.py.
//
// One row is the bytes that are contiguous on both sides. `lanes` threads move it together, 16
// bytes each, and each such group has UNROLL rows under way at once. A persistent grid walks all
// rows, so that a small grid fills a link and leaves the other processors to the engine.
//
// Without a CUDA compiler the same text is plain C++: tests compile it with g++ and hold it against
// the reference. No header of the host's is included, so nvcc, NVRTC and g++ all take it.

typedef long long i64;

#define UNROLL 4

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

typedef uint4 Vector;

// Read once: no use in L1. Not `.nc`, which may only be used where nobody ever writes.
__device__ __forceinline__ Vector load(i64 address) {
  Vector v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ void store(i64 address, Vector v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

#else

#define __global__
struct Index {
  unsigned x;
};
static Index gridDim, blockDim, blockIdx, threadIdx;

struct Vector {
  unsigned x, y, z, w;
};

static Vector load(i64 address) { return *reinterpret_cast<const Vector *>(address); }
static void store(i64 address, Vector v) { *reinterpret_cast<Vector *>(address) = v; }

#endif

// Loops around a row, outermost first: how often, and the step in bytes on each side.
struct Loops {
  i64 count[3];
  i64 source[3];
  i64 target[3];
};

// Where a row lies on both sides; address 0 is nowhere.
struct Place {
  i64 source;
  i64 target;
};

#define NOWHERE (Place{0, 0})

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
__device__ __forceinline__
#else
static
#endif
    Place
    place_of(i64 row, const i64 *source_layers, const i64 *target_layers,
             const i64 *source_offsets, const i64 *target_offsets, i64 blocks, const Loops &loops) {
  Place at = {0, 0};
  for (int n = 2; n >= 0; --n) {
    i64 step = row % loops.count[n];
    row /= loops.count[n];
    at.source += step * loops.source[n];
    at.target += step * loops.target[n];
  }
  i64 block = row % blocks, layer = row / blocks;
  i64 from = source_offsets[block], to = target_offsets[block];
  if (from < 0 || to < 0) return NOWHERE;
  at.source += source_layers[layer] + from;
  at.target += target_layers[layer] + to;
  return at;
}

// vectors: 16-byte vectors of a row. lanes: threads for a row, a power of two of at most 32.
extern "C" __global__ void move_blocks(const i64 *source_layers, const i64 *target_layers,
                                       const i64 *source_offsets, const i64 *target_offsets,
                                       i64 layers, i64 blocks, const Loops *around,
                                       i64 vectors, i64 lanes) {
  Loops loops = *around;
  i64 rows = layers * blocks * loops.count[0] * loops.count[1] * loops.count[2];
  i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  i64 group = thread / lanes, lane = thread % lanes;
  i64 groups = (i64)gridDim.x * blockDim.x / lanes;
  for (i64 first = group; first < rows; first += groups * UNROLL) {
    Place at[UNROLL];
    for (int n = 0; n < UNROLL; ++n) {
      i64 row = first + n * groups;
      at[n] = row < rows ? place_of(row, source_layers, target_layers, source_offsets,
                                    target_offsets, blocks, loops)
                         : NOWHERE;
    }
    for (i64 v = lane; v < vectors; v += lanes) {
      Vector held[UNROLL];
      for (int n = 0; n < UNROLL; ++n)
        if (at[n].target) held[n] = load(at[n].source + v * 16);
      for (int n = 0; n < UNROLL; ++n)
        if (at[n].target) store(at[n].target + v * 16, held[n]);
    }
  }
}

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)

// Every thread of the grid, one after the other.
extern "C" void move_blocks_on_host(const i64 *source_layers, const i64 *target_layers,
                                    const i64 *source_offsets, const i64 *target_offsets,
                                    i64 layers, i64 blocks, const Loops *loops, i64 vectors,
                                    i64 lanes, unsigned grid, unsigned threads) {
  gridDim.x = grid;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
      move_blocks(source_layers, target_layers, source_offsets, target_offsets, layers, blocks,
                  loops, vectors, lanes);
}

#endif
