/* The calls of the CUDA driver that brightrun makes, on host memory; see README.md. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, ILLEGAL_ADDRESS = 700 };

static FILE *log_file;
static int is_capturing, has_fault, num_events;
static size_t used;

static long setting(const char *name, long otherwise)
{
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static void note(const char *format, ...)
{
    if (!log_file)
        log_file = fopen(getenv("FAKE_CUDA_LOG") ? getenv("FAKE_CUDA_LOG") : "/dev/null", "a");
    if (is_capturing)
        fputs("captured ", log_file);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(log_file, format, arguments);
    va_end(arguments);
    fputc('\n', log_file);
    fflush(log_file);
}

static int wait(void) { return has_fault ? ILLEGAL_ADDRESS : OK; }

int cuInit(unsigned flags) { (void)flags; note("init"); return OK; }
int cuDriverGetVersion(int *version) { *version = (int)setting("FAKE_CUDA_VERSION", 13000); return OK; }
int cuDeviceGetCount(int *count) { *count = (int)setting("FAKE_CUDA_DEVICES", 1); return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
int cuDeviceGetName(char *name, int bytes, int device) { snprintf(name, (size_t)bytes, "fake %d", device); return OK; }
int cuDeviceGetAttribute(int *value, int which, int device)
{
    (void)device;
    switch (which) {
    case 16: *value = 132; return OK;       /* multiprocessors */
    case 75: *value = 9; return OK;         /* capability, major */
    case 76: *value = 0; return OK;         /* capability, minor */
    case 97: *value = 232448; return OK;    /* shared memory of a block, opted in */
    default: return INVALID;
    }
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(intptr_t)(device + 1); note("retain"); return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; note("release, %zu bytes in use", used); return OK; }
int cuCtxSetCurrent(void *context) { return context ? OK : INVALID; }

int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)7; note("stream %u", flags); return OK; }
int cuStreamDestroy_v2(void *stream) { (void)stream; note("stream destroyed"); return OK; }
int cuStreamSynchronize(void *stream) { (void)stream; note("wait"); return wait(); }

/* The size lies in front. */
int cuMemAlloc_v2(uint64_t *address, size_t bytes)
{
    if (bytes > (size_t)setting("FAKE_CUDA_BYTES", 1 << 30))
        return NO_MEMORY;
    char *base = malloc(bytes + 256);
    memcpy(base, &bytes, sizeof bytes);
    used += bytes;
    *address = (uint64_t)(uintptr_t)(base + 256);
    note("alloc %zu", bytes);
    return OK;
}
int cuMemFree_v2(uint64_t address)
{
    size_t bytes;
    char *base = (char *)(uintptr_t)address - 256;
    memcpy(&bytes, base, sizeof bytes);
    used -= bytes;
    note("free %zu", bytes);
    free(base);
    return OK;
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *total = (size_t)setting("FAKE_CUDA_BYTES", 1 << 30); *free_bytes = *total - used; return OK; }
int cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) { (void)flags; *pointer = malloc(bytes); note("pinned %zu", bytes); return OK; }
int cuMemFreeHost(void *pointer) { free(pointer); note("pinned freed"); return OK; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream)
{
    (void)stream;
    note("write %zu", bytes);
    memcpy((void *)(uintptr_t)to, from, bytes);
    return OK;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream)
{
    (void)stream;
    note("read %zu", bytes);
    memcpy(to, (const void *)(uintptr_t)from, bytes);
    return OK;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *stream)
{
    (void)stream;
    note("set %zu to %d", bytes, value);
    if (!is_capturing)
        memset((void *)(uintptr_t)to, value, bytes);
    return OK;
}

int cuEventCreate(void **event, unsigned flags) { (void)flags; *event = (void *)(intptr_t)++num_events; note("event %d", num_events); return OK; }
int cuEventRecord(void *event, void *stream) { (void)stream; note("event %d recorded", (int)(intptr_t)event); return OK; }
int cuEventSynchronize(void *event) { note("event %d waited for", (int)(intptr_t)event); return wait(); }
int cuEventDestroy_v2(void *event) { (void)event; num_events--; return OK; }

/* A module is its image, a function its name. */
int cuModuleLoadData(void **module, const void *image)
{
    if (!strncmp(image, "none", 4))
        return 209;
    *module = (void *)image;
    note("module %.4s", (const char *)image);
    return OK;
}
int cuModuleUnload(void *module) { note("module %.4s unloaded", (char *)module); return OK; }
int cuModuleGetFunction(void **function, void *module, const char *name) { (void)module; *function = strdup(name); return OK; }
int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *bytes)
{
    (void)function;
    *offset = 0;
    *bytes = 12;
    return index ? INVALID : OK;
}
int cuFuncGetAttribute(int *value, int which, void *function)
{
    (void)function;
    *value = which == 0 ? 1024 : which == 1 ? 48 : 0;   /* threads of a block; static shared memory */
    return OK;
}
int cuFuncSetAttribute(void *function, int which, int value) { note("%s attribute %d is %d", (char *)function, which, value); return OK; }
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z, unsigned shared,
                   void *stream, void **params, void **extra)
{
    if (has_fault)
        return ILLEGAL_ADDRESS;
    if (threads_y != 1 || threads_z != 1 || stream != (void *)7 || extra)
        return INVALID;
    const unsigned char *bytes = params[0];
    note("launch %s %u %u %u, %u threads, %u shared, params %d to %d", (char *)function, x, y, z, threads, shared, bytes[0], bytes[11]);
    const char *fault = getenv("FAKE_CUDA_FAULT");
    has_fault = fault && !is_capturing && !strcmp(fault, function);
    return OK;
}

int cuStreamBeginCapture_v2(void *stream, int mode) { (void)stream; note("capture, mode %d", mode); is_capturing = 1; return OK; }
int cuStreamEndCapture(void *stream, void **graph) { (void)stream; is_capturing = 0; note("capture ends"); *graph = (void *)3; return OK; }
int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) { (void)flags; note("instantiate"); *exec = graph; return OK; }
int cuGraphLaunch(void *exec, void *stream) { (void)exec, (void)stream; note("graph launch"); return OK; }
int cuGraphDestroy(void *graph) { (void)graph; note("graph destroyed"); return OK; }
int cuGraphExecDestroy(void *exec) { (void)exec; note("graph exec destroyed"); return OK; }

int cuGetErrorName(int error, const char **name) { *name = error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR"; return OK; }
int cuGetErrorString(int error, const char **text) { *text = error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "an error"; return OK; }
