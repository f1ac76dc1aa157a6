// A CUDA driver that carries everything out at once, on the host, and counts what it is asked.
// Compiled against NVIDIA's own cuda.h: what does not fit its prototypes does not compile, and what
// Python passes wrongly arrives wrongly. Device memory is host memory, a stream is its number.
//
// BATCH 13, 12 or 0: cuMemcpyBatchAsync as CUDA 13 or 12.8 has it, or not at all.

#include <cuda.h>
#include <string.h>

#include <map>
#include <string>

static std::map<std::string, long> calls;
static std::map<CUstream, long> last_order;
static long priorities, bytes_registered;
static thread_local CUcontext current;
static int failing;

#define ASKED(name) calls[name]++; if (failing && calls[name] >= failing) return CUDA_ERROR_UNKNOWN
#define NEEDS_CONTEXT if (!current) return CUDA_ERROR_INVALID_CONTEXT

extern "C" {

long asked(const char *name) { return calls[name]; }
long registered() { return bytes_registered; }
long order_of(void *stream) { return last_order[(CUstream)stream]; }
void fail_from(int call) { failing = call; calls.clear(); }

CUresult CUDAAPI cuGetErrorName(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_UNKNOWN ? "CUDA_ERROR_UNKNOWN" : "another error";
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuInit(unsigned int) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGetCount(int *count) { *count = 2; return CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *value = 0x17 + device; break;
    case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID: *value = device; break;
    case CU_DEVICE_ATTRIBUTE_NUMA_CONFIG: *value = CU_DEVICE_NUMA_CONFIG_NUMA_NODE; break;
    case CU_DEVICE_ATTRIBUTE_NUMA_ID: *value = 8 + device; break;
    case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES: *value = 1; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetName(char *name, int size, CUdevice) {
  strncpy(name, "Fake GH200", size);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
  memset(uuid->bytes, 0x10 + device, 16);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceTotalMem(size_t *bytes, CUdevice) { *bytes = 96ull << 30; return CUDA_SUCCESS; }
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  ASKED("cuDevicePrimaryCtxRetain");
  *context = (CUcontext)(0x100 + (size_t)device);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) { current = context; return CUDA_SUCCESS; }

CUresult CUDAAPI cuMemHostRegister(void *, size_t bytes, unsigned int flags) {
  NEEDS_CONTEXT;
  ASKED("cuMemHostRegister");
  if (flags != (CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP))
    return CUDA_ERROR_INVALID_VALUE;
  bytes_registered += bytes;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemHostUnregister(void *) {
  NEEDS_CONTEXT;
  ASKED("cuMemHostUnregister");
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemHostAlloc(void **address, size_t bytes, unsigned int) {
  NEEDS_CONTEXT;
  ASKED("cuMemHostAlloc");
  *address = new char[bytes];
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
  NEEDS_CONTEXT;
  ASKED("cuMemcpyAsync");
  memcpy((void *)to, (void *)from, bytes);
  return CUDA_SUCCESS;
}

__attribute__((unused)) static CUresult batch(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count,
                      CUmemcpyAttributes *attributes, size_t *first, size_t kinds,
                      CUstream stream) {
  NEEDS_CONTEXT;
  ASKED("cuMemcpyBatchAsync");
  if (kinds != 1 || first[0] != 0 || !stream || attributes[0].flags) return CUDA_ERROR_INVALID_VALUE;
  if (attributes[0].srcLocHint.type || attributes[0].dstLocHint.type)
    return CUDA_ERROR_INVALID_VALUE;
  last_order[stream] = attributes[0].srcAccessOrder;
  for (size_t n = 0; n < count; ++n) memcpy((void *)to[n], (void *)from[n], bytes[n]);
  return CUDA_SUCCESS;
}
#if BATCH == 13
CUresult CUDAAPI cuMemcpyBatchAsync(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count,
                                    CUmemcpyAttributes *attributes, size_t *first, size_t kinds,
                                    CUstream stream) {
  return batch(to, from, bytes, count, attributes, first, kinds, stream);
}
#elif BATCH == 12
#undef cuMemcpyBatchAsync
CUresult CUDAAPI cuMemcpyBatchAsync(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count,
                                    CUmemcpyAttributes *attributes, size_t *first, size_t kinds,
                                    size_t *failed, CUstream stream) {
  *failed = count;
  return batch(to, from, bytes, count, attributes, first, kinds, stream);
}
#endif

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream *stream, unsigned int flags, int priority) {
  NEEDS_CONTEXT;
  if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  priorities += priority;
  *stream = (CUstream)(0x1000 + ++calls["streams"]);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned int flags) {
  NEEDS_CONTEXT;
  ASKED("cuEventCreate");
  if (flags != CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_VALUE;
  *event = (CUevent) new CUstream(nullptr);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
  ASKED("cuEventRecord");
  *(CUstream *)event = stream;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventQuery(CUevent event) {
  ASKED("cuEventQuery");
  return calls["cuEventQuery"] % 2 ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventSynchronize(CUevent) { ASKED("cuEventSynchronize"); return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
  ASKED("cuStreamWaitEvent");
  return stream && *(CUstream *)event && !flags ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

#include "move.inc"

static void run(const i64 *a, const i64 *b, const i64 *c, const i64 *d, i64 layers, i64 blocks,
                const Loops *loops, i64 vectors, i64 lanes, unsigned grid, unsigned threads) {
  move_blocks_on_host(a, b, c, d, layers, blocks, loops, vectors, lanes, grid, threads);
}
void *kernel() { return (void *)run; }

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned int x, unsigned int y, unsigned int z,
                                unsigned int threads, unsigned int threads_y,
                                unsigned int threads_z, unsigned int shared, CUstream stream,
                                void **parameters, void **extra) {
  NEEDS_CONTEXT;
  ASKED("cuLaunchKernel");
  if (function != (CUfunction)run || y != 1 || z != 1 || threads_y != 1 || threads_z != 1 ||
      shared || !stream || extra)
    return CUDA_ERROR_INVALID_VALUE;
  i64 value[9];
  for (int n = 0; n < 9; ++n) value[n] = *(i64 *)parameters[n];
  run((i64 *)value[0], (i64 *)value[1], (i64 *)value[2], (i64 *)value[3], value[4], value[5],
      (Loops *)value[6], value[7], value[8], x, threads);
  return CUDA_SUCCESS;
}
}
