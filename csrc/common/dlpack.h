// The structures of DLPack (https://dmlc.github.io/dlpack): version 0.8 ABI, what a "dltensor" capsule points to, and
// the table of functions of version 1 that a type offers as __dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace fastlvm::dlpack {

enum DeviceType : int32_t { device_cpu = 1, device_cuda_host = 3 };
enum TypeCode : uint8_t { code_float = 2, code_bfloat = 4 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means row-major and contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  Exchange* previous;
  void (*allocate)();  // this and the next two have other types, and are not called here
  void (*export_managed)();
  void (*import_managed)();
  int (*describe)(void* object, Tensor* tensor);  // may be null; not 0 with an exception set; owns nothing
  void (*current_stream)();
};

}  // namespace fastlvm::dlpack
