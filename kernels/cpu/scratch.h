// Memory that outlives a call.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <memory>

namespace sparsedm {

// A buffer that a thread keeps: what is allocated anew at each call may be given back to the system after it, and is then
// faulted in again, 8 % of a convolution of 2 ms.
class Scratch {
 public:
  template <class T>
  T* get(int64_t elements) {
    const size_t bytes = (elements * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      data_.reset();
      size_ = 0;  // should there be no memory, a later, smaller call must not find the old size
      data_.reset(std::aligned_alloc(64, bytes));
      TORCH_CHECK(data_ != nullptr, "out of memory: ", bytes, " bytes for a buffer");
      std::memset(data_.get(), 0, bytes);  // lanes past the last token are computed, never used
      size_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

}  // namespace sparsedm
