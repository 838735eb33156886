// SPDX-License-Identifier: Apache-2.0
// One device in host memory, under the interface of CANN's runtime as the headers in the torch_npu wheel declare it.
//
// Memory and copies are real. Streams, events and the operations' descriptors are numbers, and work submitted to a
// stream completes at once. Operations compute nothing: their entry points are among the stubs that return success.
// Device memory is mapped without being reserved: unwritten pages read as zeros and use no memory.

#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

enum {
    DEVICE_BYTES_SHIFT = 36,  // 64 GiB, as a device of Atlas A2 and A3 has
    PAGE = 4096,
    CORES = 24,
    OUT_OF_MEMORY = 207001,
    NO_SUCH_DEVICE = 107001,
};
static const size_t DEVICE_BYTES = (size_t)1 << DEVICE_BYTES_SHIFT;

static _Atomic size_t used_bytes;
static _Atomic size_t handles = PAGE;

static void *next_handle(void) { return (void *)(handles += 16); }

static aclError take(size_t size) {
    if ((used_bytes += size) <= DEVICE_BYTES) return 0;
    used_bytes -= size;
    return OUT_OF_MEMORY;
}

// The page before the memory that is handed out holds the size of the whole.
static aclError map_pages(void **pointer, size_t size) {
    size += PAGE;
    size_t *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return OUT_OF_MEMORY;
    *base = size;
    *pointer = (char *)base + PAGE;
    return 0;
}
static size_t unmap_pages(void *pointer) {
    size_t *base = (size_t *)((char *)pointer - PAGE), size = *base;
    munmap(base, size);
    return size - PAGE;
}

static aclError allocate(void **pointer, size_t size) { return take(size) ? OUT_OF_MEMORY : map_pages(pointer, size); }
aclError aclrtMalloc(void **p, size_t size, aclrtMemMallocPolicy policy) { return allocate(p, size); }
aclError aclrtMallocAlign32(void **p, size_t size, aclrtMemMallocPolicy policy) { return allocate(p, size); }
aclError aclrtMallocWithCfg(void **p, size_t size, aclrtMemMallocPolicy policy, aclrtMallocConfig *config) {
    return allocate(p, size);
}
aclError aclrtFree(void *pointer) {
    used_bytes -= unmap_pages(pointer);
    return 0;
}

// Expandable segments: addresses are memory already, and physical memory, to be mapped there, is only counted.
aclError aclrtReserveMemAddress(void **p, size_t size, size_t alignment, void *expected, uint64_t flags) {
    return map_pages(p, size);
}
aclError aclrtReleaseMemAddress(void *pointer) {
    unmap_pages(pointer);
    return 0;
}
aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t size, const aclrtPhysicalMemProp *prop, uint64_t flags) {
    *handle = (aclrtDrvMemHandle)size;
    return take(size);
}
aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    used_bytes -= (size_t)handle;
    return 0;
}
aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *prop, aclrtMemGranularityOptions option, size_t *size) {
    *size = 2 << 20;
    return 0;
}

static aclError host_memory(void **pointer, size_t size) {
    return posix_memalign(pointer, 512, size ? size : 1) ? OUT_OF_MEMORY : 0;
}
aclError aclrtMallocHost(void **p, size_t size) { return host_memory(p, size); }
aclError aclrtMallocHostWithCfg(void **p, uint64_t size, aclrtMallocConfig *config) { return host_memory(p, size); }
aclError aclrtFreeHost(void *pointer) {
    free(pointer);
    return 0;
}

static aclError copy(void *to, const void *from, size_t count) {
    if (count) memmove(to, from, count);
    return 0;
}
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind) {
    return copy(to, from, count);
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind, aclrtStream s) {
    return copy(to, from, count);
}
aclError aclrtMemset(void *p, size_t room, int32_t value, size_t count) {
    memset(p, value, count);
    return 0;
}
aclError aclrtMemsetAsync(void *p, size_t room, int32_t value, size_t count, aclrtStream stream) {
    return aclrtMemset(p, room, value, count);
}

// The devices: one, or as many as FAKE_NPUS says.
static int32_t current_device;
aclError aclrtGetDeviceCount(uint32_t *count) {
    const char *given = getenv("FAKE_NPUS");
    *count = given ? atoi(given) : 1;
    return 0;
}
aclError aclrtSetDevice(int32_t device) {
    uint32_t count;
    aclrtGetDeviceCount(&count);
    if (device < 0 || device >= (int32_t)count)
        return NO_SUCH_DEVICE;
    current_device = device;
    return 0;
}
aclError aclrtGetDevice(int32_t *device) {
    *device = current_device;
    return 0;
}
const char *aclrtGetSocName(void) { return SOC_NAME; }
aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *free_bytes, size_t *total_bytes) {
    *free_bytes = DEVICE_BYTES - used_bytes;
    *total_bytes = DEVICE_BYTES;
    return 0;
}
aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr what, int64_t *value) {
    *value = CORES;
    return 0;
}
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo what, int64_t *value) {
    *value = CORES;
    return 0;
}
aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t *value) {
    *value = CORES;
    return 0;
}
aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value) {
    *value = CORES;
    return 0;
}
aclError aclrtDeviceCanAccessPeer(int32_t *can_access, int32_t device, int32_t peer) {
    *can_access = 0;
    return 0;
}
aclError aclGetCannAttribute(aclCannAttr attribute, int32_t *value) {
    *value = 0;
    return 0;
}
aclError aclsysGetVersionStr(char *package, char *version) {
    strcpy(version, CANN_VERSION);
    return 0;
}
aclError aclsysGetCANNVersion(aclCANNPackageName package, aclCANNPackageVersion *version) {
    memset(version, 0, sizeof *version);
    strcpy(version->version, CANN_VERSION);
    sscanf(CANN_VERSION, "%[0-9].%[0-9].%[0-9]", version->majorVersion, version->minorVersion, version->releaseVersion);
    return 0;
}

// Streams and events. Every query reports completion.
aclError aclrtCreateStream(aclrtStream *stream) {
    *stream = next_handle();
    return 0;
}
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
    return aclrtCreateStream(stream);
}
aclError aclrtGetStreamAvailableNum(uint32_t *count) {
    *count = 1024;
    return 0;
}
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    *status = ACL_STREAM_STATUS_COMPLETE;
    return 0;
}
aclError aclrtCreateEvent(aclrtEvent *event) {
    *event = next_handle();
    return 0;
}
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEvent(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEvent(event); }
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return 0;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return 0;
}
aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
    *ms = 0;
    return 0;
}
aclError aclrtCreateContext(aclrtContext *context, int32_t device) {
    *context = next_handle();
    return 0;
}
aclError aclrtGetCurrentContext(aclrtContext *context) {
    *context = (void *)PAGE;
    return 0;
}
aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *graph) {
    *status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    *graph = NULL;
    return 0;
}

const char *aclGetRecentErrMsg(void) { return ""; }
size_t aclGetCompileoptSize(aclCompileOpt option) { return 256; }
aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t length) {
    if (length) value[0] = 0;
    return 0;
}

// Descriptors of an operation's arguments: the wheel only checks that it got some.
#define DESCRIPTOR(name) \
    void *name(void) { return next_handle(); }
DESCRIPTOR(aclCreateTensor)
DESCRIPTOR(aclCreateTensorList)
DESCRIPTOR(aclCreateScalar)
DESCRIPTOR(aclCreateScalarList)
DESCRIPTOR(aclCreateIntArray)
DESCRIPTOR(aclCreateFloatArray)
DESCRIPTOR(aclCreateBoolArray)
