// The structures of DLPack (https://dmlc.github.io/dlpack), version 0.8 ABI: what a "dltensor" capsule points to.
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

}  // namespace fastlvm::dlpack
