// The operators that Python calls, with their checks.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <array>
#include <string_view>

#include "pack.h"
#include "run.h"
#include "source.h"

namespace sparsedm {
namespace {

using at::Tensor;

// The C library takes large tensors from the system anew at each call, to be faulted in by pages of 4 KB. In pages of 2 MB,
// 640 -> 640 at 16,384 tokens takes 21 ms in place of 33 at 1:4v4, 36 in place of 48 at 2:4v4 (docs/performance.md).
Tensor empty_on_huge_pages(at::IntArrayRef shape, const at::TensorOptions& options, at::MemoryFormat format) {
  Tensor out = at::empty(shape, options, format);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20, kFromSystem = 32 << 20;  // glibc serves no more than that from its heap
  if (out.nbytes() >= kFromSystem) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + out.nbytes()) / kHuge * kHuge;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal costs nothing
  }
#endif
  return out;
}

// Calls `function` with an element of this type.
template <class Function>
auto with_element(at::ScalarType dtype, Function function) {
  switch (dtype) {
    case at::kFloat: return function(float{});
    case at::kBFloat16: return function(BFloat16{});
    case at::kHalf: return function(Half{});
    default: TORCH_CHECK_VALUE(false, "weight: want float32, bfloat16 or float16, got ", dtype);
  }
}

const char* name_of(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : dtype == at::kBFloat16 ? "bfloat16" : "float16";
}

// Of a linear layer, which has neither stride nor dilation, or of a convolution of two or three dimensions.
Layout layout_of(at::IntArrayRef weight_shape, int64_t n, int64_t m, int64_t v, at::IntArrayRef stride,
                 at::IntArrayRef dilation, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(weight_shape.size() >= 2 && weight_shape.size() <= 5, "weight: want 2 to 5 dimensions, got ",
                    weight_shape);
  const size_t dims = weight_shape.size() - 2;
  TORCH_CHECK_VALUE(stride.size() == dims && dilation.size() == dims, "stride ", stride, " and dilation ", dilation,
                    ": want ", dims, " numbers each for a weight of shape ", weight_shape);
  KernelAxes axes;
  for (size_t d = 0; d < dims; ++d) {
    TORCH_CHECK_VALUE(weight_shape[2 + d] > 0 && stride[d] > 0 && dilation[d] > 0, "stride ", stride, " and dilation ",
                      dilation, " of a weight of shape ", weight_shape, ": want positive numbers");
    axes[3 - dims + d] = {weight_shape[2 + d], stride[d], dilation[d]};
  }
  TORCH_CHECK_VALUE(0 < n && n < m && m <= 32 && v >= 1 && weight_shape[1] % m == 0 && weight_shape[0] % v == 0,
                    "a weight of shape ", weight_shape, " cannot be ", n, ":", m, "v", v);
  return with_element(dtype, [&]<class T>(T) {
    return Layout(n, m, v, weight_shape[0], weight_shape[1], axes, typename PanelOf<T>::type{});
  });
}

void check_packed(const Layout& layout, const Tensor& values, const Tensor& index) {
  TORCH_CHECK_VALUE(values.is_contiguous() && values.numel() == layout.values_size(), "values: want ",
                    layout.values_size(), " contiguous ", name_of(values.scalar_type()), ", got ", values.numel());
  TORCH_CHECK_VALUE(index.is_contiguous() && index.scalar_type() == at::kShort && index.numel() == layout.index_size(),
                    "index: want ", layout.index_size(), " contiguous int16, got ", index.numel(), " of ",
                    index.scalar_type());
}

std::tuple<int64_t, int64_t> packed_sizes(at::IntArrayRef weight_shape, int64_t n, int64_t m, int64_t v,
                                          at::IntArrayRef stride, at::IntArrayRef dilation, at::ScalarType dtype) {
  const Layout layout = layout_of(weight_shape, n, m, v, stride, dilation, dtype);
  return {layout.values_size(), layout.index_size()};
}

std::tuple<Tensor, Tensor> pack_weight(const Tensor& weight, int64_t n, int64_t m, int64_t v, at::IntArrayRef stride,
                                       at::IntArrayRef dilation) {
  const Layout layout = layout_of(weight.sizes(), n, m, v, stride, dilation, weight.scalar_type());
  const Tensor dense = weight.contiguous();
  Tensor values = at::empty({layout.values_size()}, dense.options());
  Tensor index = at::empty({layout.index_size()}, dense.options().dtype(at::kShort));
  with_element(weight.scalar_type(), [&]<class T>(T) {
    pack(layout, dense.const_data_ptr<T>(), values.mutable_data_ptr<T>(), index.mutable_data_ptr<int16_t>());
  });
  return {values, index};
}

Tensor unpack_weight(const Tensor& values, const Tensor& index, at::IntArrayRef weight_shape, int64_t n, int64_t m,
                     int64_t v, at::IntArrayRef stride, at::IntArrayRef dilation) {
  const Layout layout = layout_of(weight_shape, n, m, v, stride, dilation, values.scalar_type());
  check_packed(layout, values, index);
  Tensor weight = at::zeros(weight_shape, values.options());
  with_element(values.scalar_type(), [&]<class T>(T) {
    unpack(layout, values.const_data_ptr<T>(), index.const_data_ptr<int16_t>(), weight.mutable_data_ptr<T>());
  });
  return weight;
}

// In float32, as sums are.
Tensor bias_or_zero(const std::optional<Tensor>& bias, const Layout& layout, const Tensor& x) {
  if (!bias.has_value()) return at::zeros({layout.out}, x.options().dtype(at::kFloat));
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == layout.out && bias->scalar_type() == x.scalar_type(),
                    "bias: want ", name_of(x.scalar_type()), " of shape (", layout.out, "), got ", bias->scalar_type(),
                    " of ", bias->sizes());
  return bias->contiguous().to(at::kFloat);
}

// The residual laid out as the output, or undefined.
Tensor residual_like(const std::optional<Tensor>& residual, const Tensor& out, at::MemoryFormat format) {
  if (!residual.has_value()) return Tensor();
  TORCH_CHECK_VALUE(residual->sizes() == out.sizes() && residual->scalar_type() == out.scalar_type(),
                    "residual: want ", name_of(out.scalar_type()), " of the output's shape ", out.sizes(), ", got ",
                    residual->scalar_type(), " of ", residual->sizes());
  return residual->contiguous(format);
}

Activation activation_of(std::string_view name) {
  constexpr std::string_view kNames[] = {"none", "gelu", "gelu_tanh", "silu", "geglu"};  // in the order of Activation
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  TORCH_CHECK_VALUE(found != std::end(kNames), "activation: want none, gelu, gelu_tanh, silu or geglu, got ", name);
  return static_cast<Activation>(found - std::begin(kNames));
}

template <class T>
const T* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& index, at::IntArrayRef weight_shape, int64_t n,
              int64_t m, int64_t v, const std::optional<Tensor>& bias, std::string_view activation_name,
              const std::optional<Tensor>& residual) {
  const Activation activation = activation_of(activation_name);
  const Layout layout = layout_of(weight_shape, n, m, v, {}, {}, values.scalar_type());
  check_packed(layout, values, index);
  TORCH_CHECK_VALUE(x.scalar_type() == values.scalar_type() && x.dim() >= 1 && x.size(-1) == layout.channels,
                    "x: want ", name_of(values.scalar_type()), " of shape (..., ", layout.channels, "), got ",
                    x.scalar_type(), " of ", x.sizes());
  Tensor rows = x.reshape({-1, layout.channels});
  if (rows.stride(1) != 1) rows = rows.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  const bool gated = activation == kGeglu;
  TORCH_CHECK_VALUE(!gated || layout.out % (2 * kUnit) == 0, "activation: geglu needs a multiple of ", 2 * kUnit,
                    " output channels, got ", layout.out);
  shape.back() = gated ? layout.out / 2 : layout.out;
  Tensor out = empty_on_huge_pages(shape, x.options(), at::MemoryFormat::Contiguous);
  const Tensor addend = residual_like(residual, out, at::MemoryFormat::Contiguous);
  if (rows.size(0) == 0) return out;
  const Tensor start = bias_or_zero(bias, layout, x);
  with_element(x.scalar_type(), [&]<class T>(T) {
    run(layout, values.const_data_ptr<T>(), index.const_data_ptr<int16_t>(), start.const_data_ptr<float>(),
        activation, TokenRows<T>{rows.const_data_ptr<T>(), rows.stride(0), rows.size(0)},
        TokenMajor<T>{out.mutable_data_ptr<T>(), data_or_null<T>(addend), shape.back()});
  });
  return out;
}

Window window_of(const Tensor& x, at::IntArrayRef weight_shape, at::IntArrayRef stride, at::IntArrayRef padding,
                 at::IntArrayRef dilation) {
  const int64_t dims = x.dim() - 2;
  std::array<Axis, 3> axes;
  axes.fill({1, 0, {}});
  for (int64_t d = 0; d < dims; ++d) {
    Axis& axis = axes[3 - dims + d] = {x.size(2 + d), padding[d], {weight_shape[2 + d], stride[d], dilation[d]}};
    TORCH_CHECK_VALUE(axis.size + 2 * axis.padding >= axis.kernel.reach(), "x: the kernel spans ", axis.kernel.reach(),
                      " pixels of dimension ", 2 + d, ", more than the padded input of ", x.sizes());
  }
  return {x.size(0), x.size(1), axes[0], axes[1], axes[2]};
}

// A padded image up to this size is kept between calls, one for each thread that calls.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kKeptBytes = 0;  // so that a read past an image is one past its allocation
#else
constexpr int64_t kKeptBytes = 16 << 20;
#endif

Scratch& kept_image() {
  static thread_local Scratch kept;
  return kept;
}

// Of two or three dimensions, as the weight's shape says.
Tensor conv(const Tensor& x, const Tensor& values, const Tensor& index, at::IntArrayRef weight_shape, int64_t n,
            int64_t m, int64_t v, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
            const std::optional<Tensor>& bias, std::string_view activation_name,
            const std::optional<Tensor>& residual) {
  const Activation activation = activation_of(activation_name);
  const Layout layout = layout_of(weight_shape, n, m, v, stride, dilation, values.scalar_type());
  check_packed(layout, values, index);
  const int64_t rank = static_cast<int64_t>(weight_shape.size());
  TORCH_CHECK_VALUE((rank == 4 || rank == 5) && x.scalar_type() == values.scalar_type() && x.dim() == rank &&
                        x.size(1) == layout.channels,
                    "x: want ", name_of(values.scalar_type()), " of shape (B, ", layout.channels,
                    rank == 5 ? ", D" : "", ", H, W), got ", x.scalar_type(), " of ", x.sizes());
  const size_t dims = static_cast<size_t>(rank) - 2;
  TORCH_CHECK_VALUE(padding.size() == dims, "padding ", padding, ": want ", dims, " numbers, one a dimension");
  TORCH_CHECK_VALUE(activation != kGeglu, "activation: geglu follows linear layers alone");
  const Window window = window_of(x, weight_shape, stride, padding, dilation);
  const at::MemoryFormat format = x.suggest_memory_format();
  const bool channels_last = format != at::MemoryFormat::Contiguous;
  const Tensor image = x.contiguous(format);
  std::vector<int64_t> shape = {x.size(0), layout.out, window.z.out(), window.y.out(), window.x.out()};
  if (rank == 4) shape.erase(shape.begin() + 2);
  Tensor out = empty_on_huge_pages(shape, x.options(), format);
  const Tensor addend = residual_like(residual, out, format);
  if (out.numel() == 0) return out;
  const Tensor start = bias_or_zero(bias, layout, x);

  with_element(x.scalar_type(), [&]<class T>(T) {
    Planes<T> planes(window);
    Tensor large;
    if (planes.is_identity() && !channels_last) {
      planes.data = image.const_data_ptr<T>();
      planes.end = planes.data + image.numel();
    } else {
      const int64_t size = planes.size() + planes.kPiece;
      T* padded;
      if (size * static_cast<int64_t>(sizeof(T)) <= kKeptBytes) {
        padded = kept_image().get<T>(size);
      } else {
        large = empty_on_huge_pages({size}, x.options(), at::MemoryFormat::Contiguous);
        padded = large.mutable_data_ptr<T>();
      }
      const auto split = channels_last ? split_channels_last<T> : split_channel_major<T>;
      split(planes, image.const_data_ptr<T>(), padded);
      planes.data = padded;
      planes.end = padded + size;
    }
    const auto go = [&](const auto& source, const auto& sink) {
      run(layout, values.const_data_ptr<T>(), index.const_data_ptr<int16_t>(), start.const_data_ptr<float>(),
          activation, source, sink);
    };
    if (channels_last) {
      go(planes, TokenMajor<T>{out.mutable_data_ptr<T>(), data_or_null<T>(addend), layout.out});
    } else {
      go(planes, ChannelMajor<T>{out.mutable_data_ptr<T>(), data_or_null<T>(addend), layout.out, window.pixels()});
    }
  });
  return out;
}

// splitmix64 (Steele, Lea, Flood 2014): turns a counter into 64 well mixed bits.
uint64_t mix(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The distance in elements from the first element to the one of this logical position, for any strides.
uint64_t offset_of(const Tensor& tensor, uint64_t position) {
  int64_t offset = 0;
  for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
    const uint64_t size = tensor.size(d);
    offset += static_cast<int64_t>(position % size) * tensor.stride(d);
    position /= size;
  }
  return offset;
}

// A hash of up to 64 elements at even distances, each shifted by up to an eighth of the distance so that they do not all
// stand in one column: in storage order where the tensor fills its storage, which saves the divisions. Whatever changes a
// run of a fiftieth of the tensor, such as one head of a fused projection, changes one of them.
int64_t checksum_one(const Tensor& tensor) {
  constexpr uint64_t kPlaces = 64;
  const bool dense = tensor.is_non_overlapping_and_dense();
  const uint64_t size = tensor.numel(), bytes = tensor.element_size();
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  uint64_t hash = mix(size);
  for (uint64_t i = 0; i < std::min(kPlaces, size); ++i) {
    uint64_t position = i;
    if (size > kPlaces) position = size / kPlaces * i + mix(i) % (size / kPlaces / 8 + 1);
    uint64_t element = 0;
    std::memcpy(&element, data + (dense ? position : offset_of(tensor, position)) * bytes,
                std::min<uint64_t>(bytes, sizeof(element)));
    hash = (hash ^ element) * 0x9fb21c651e98df25u;
    hash ^= hash >> 29;
  }
  return static_cast<int64_t>(mix(hash));
}

std::vector<int64_t> checksum(at::TensorList tensors) {
  std::vector<int64_t> sums;
  sums.reserve(tensors.size());
  for (const Tensor& tensor : tensors) sums.push_back(checksum_one(tensor));
  return sums;
}

}  // namespace
}  // namespace sparsedm

TORCH_LIBRARY(sparsedm_cpu, library) {
  library.def("packed_sizes(int[] weight_shape, int n, int m, int v, int[] stride, int[] dilation, ScalarType dtype) -> (int, int)",
              &sparsedm::packed_sizes);
  library.def("pack(Tensor weight, int n, int m, int v, int[] stride, int[] dilation) -> (Tensor, Tensor)");
  library.def(
      "unpack(Tensor values, Tensor index, int[] weight_shape, int n, int m, int v, int[] stride, int[] dilation) -> "
      "Tensor");
  library.def(
      "linear(Tensor x, Tensor values, Tensor index, int[] weight_shape, int n, int m, int v, "
      "Tensor? bias=None, str activation=\"none\", Tensor? residual=None) -> Tensor");
  library.def(
      "conv(Tensor x, Tensor values, Tensor index, int[] weight_shape, int n, int m, int v, int[] stride, "
      "int[] padding, int[] dilation, Tensor? bias=None, str activation=\"none\", Tensor? residual=None) -> Tensor");
  library.def("checksum(Tensor[] tensors) -> int[]");
}

TORCH_LIBRARY_IMPL(sparsedm_cpu, CPU, library) {
  library.impl("pack", &sparsedm::pack_weight);
  library.impl("unpack", &sparsedm::unpack_weight);
  library.impl("linear", &sparsedm::linear);
  library.impl("conv", &sparsedm::conv);
  library.impl("checksum", &sparsedm::checksum);
}
