// A second device in the memory of the host (torch's PrivateUse1), for tests without a GPU.
//
// Every operation runs on the CPU, but its tensors carry another device. So what a GPU would refuse
// is refused here too: operations that mix devices, generators of the CPU, and float64 where an
// Apple GPU is acted. Not shown: races, asynchrony, TF32, the rounding of a GPU's kernels.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

constexpr auto kEmulated = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kEmulated, 0);
std::atomic<bool> float64_is_forbidden{false};
std::atomic<int64_t> bytes_in_use{0};
std::atomic<int64_t> bytes_at_most{0};  // 0: no limit

// --- memory ---------------------------------------------------------------------------------------

struct HostAllocator final : c10::Allocator {
  static constexpr size_t kHeader = 64;  // holds the size; keeps the alignment

  static void release(void* data) {
    if (data == nullptr) return;
    auto* start = static_cast<char*>(data) - kHeader;
    bytes_in_use -= *reinterpret_cast<size_t*>(start);
    std::free(start);
  }
  c10::DataPtr allocate(size_t size) override {
    TORCH_CHECK_WITH(OutOfMemoryError,
                     bytes_at_most == 0 || bytes_in_use + int64_t(size) <= bytes_at_most,
                     "MPS backend out of memory (emulated). Tried to allocate ", size, " bytes");
    void* start = nullptr;
    TORCH_CHECK(posix_memalign(&start, kHeader, size + kHeader) == 0);
    *static_cast<size_t*>(start) = size;
    bytes_in_use += size;
    void* data = static_cast<char*>(start) + kHeader;
    return {data, data, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
};
HostAllocator allocator;
REGISTER_ALLOCATOR(kEmulated, &allocator);

// --- one device, one stream, generators of its own -----------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::DeviceType type() const override { return kEmulated; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream(device);
  }
  c10::Stream exchangeStream(c10::Stream other) const override { return other; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {
  Generator() : at::CPUGeneratorImpl(c10::detail::getNonDeterministicRandom()) {
    device_ = kDevice;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::make_generator<Generator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto data = allocator.allocate(size);
    if (storage.data()) std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    auto& changed = const_cast<c10::Storage&>(storage);
    changed.set_data_ptr(std::move(data));
    changed.set_nbytes(size);
  }
};
Hooks hooks;

// --- tensors: made, copied, read -------------------------------------------------------------------

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      !(float64_is_forbidden && (dtype == at::kDouble || dtype == at::kComplexDouble)),
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64 "
      "(emulated)");
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  auto kind = c10::dtype_or_default(dtype);
  check_dtype(kind);
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, kind, format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  auto kind = c10::dtype_or_default(dtype);
  check_dtype(kind);
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, kind);
}

// The same memory, as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  auto options = tensor.options().device(at::kCPU);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}
std::optional<at::Tensor> on_host(const std::optional<at::Tensor>& tensor) {
  return tensor && tensor->defined() ? std::optional(on_host(*tensor)) : std::nullopt;
}
at::Tensor on_device(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.to(kDevice) : tensor;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar read_number(const at::Tensor& tensor) { return on_host(tensor).item(); }

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size,
                         std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(size), format);
}

}  // namespace

namespace at::native {  // exported by torch, declared in none of its headers
Tensor view(const Tensor&, IntArrayRef);
Tensor as_strided_tensorimpl(const Tensor&, IntArrayRef, IntArrayRef, std::optional<int64_t>);
Tensor _reshape_alias(const Tensor&, IntArrayRef, IntArrayRef);
Tensor unfold(const Tensor&, int64_t, int64_t, int64_t);
Tensor& set_storage_cpu_(Tensor&, Storage, int64_t, IntArrayRef, IntArrayRef);
Tensor& set_tensor_(Tensor&, const Tensor&);
Tensor& set_(Tensor&, Storage);
}  // namespace at::native

namespace {

// --- operations -------------------------------------------------------------------------------------

// All operations without a kernel below: check the devices, then run it on the CPU.
void run_on_host(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  const auto& arguments = schema.arguments();
  const auto first = stack->size() - arguments.size();
  bool has_device = false;
  std::string stranger;
  auto look = [&](const at::Tensor& tensor, const std::string& name) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == kEmulated) {
      has_device = true;
      check_dtype(tensor.scalar_type());
    } else if (tensor.dim() > 0 || !tensor.is_cpu()) {  // a number on the CPU is allowed on CUDA too
      stranger = name + " on " + tensor.device().str();
    }
  };
  std::vector<std::pair<at::Generator, at::Generator>> generators;
  for (size_t index = 0; index < arguments.size(); ++index) {
    auto& value = (*stack)[first + index];
    const auto& name = arguments[index].name();
    if (value.isTensor()) {
      look(value.toTensor(), name);
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) look(tensor, name);
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector())
        if (tensor) look(*tensor, name);
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == kEmulated,
                  "Expected a generator of the emulated device but found one of ",
                  generator.device().str(), " in ", schema.name());
      auto twin = at::make_generator<at::CPUGeneratorImpl>();
      twin.set_state(generator.get_state());
      generators.emplace_back(generator, twin);
      value = twin;
    }
  }
  // Indices on the CPU are allowed on CUDA too: a copy, for which the host waits. That is counted.
  const bool indexes = schema.name() == "aten::index" || schema.name() == "aten::_index_put_impl_";
  TORCH_CHECK(!has_device || stranger.empty() || indexes,
              "Expected all tensors to be on the same device, but found at least two devices in ",
              schema.name(), ": ", stranger);
  at::native::cpu_fallback(operation, stack);
  for (auto& [generator, twin] : generators) generator.set_state(twin.get_state());
}

void check_device(const std::optional<at::Tensor>& tensor, const char* name) {
  TORCH_CHECK(!tensor || !tensor->defined() || tensor->device().type() == kEmulated,
              "Expected all tensors to be on the same device, but ", name, " is on ",
              tensor->device().str());
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, c10::IntArrayRef stride,
                       c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef output_padding, int64_t groups) {
  check_device(input, "the input");
  check_device(weight, "the weight");
  check_device(bias, "the bias");
  check_dtype(input.scalar_type());
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  return on_device(at::convolution(on_host(input), on_host(weight), on_host(bias), stride, padding,
                                   dilation, transposed, output_padding, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight,
    c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
    c10::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  const int64_t outputs[] = {weight.size(0)};
  auto [of_input, of_weight, of_bias] = at::convolution_backward(
      on_host(gradient), on_host(input), on_host(weight), at::OptionalIntArrayRef(outputs), stride,
      padding, dilation, transposed, output_padding, groups, mask);
  return {on_device(of_input), on_device(of_weight), on_device(of_bias)};
}

// Its schema does not say that it changes the running statistics: the fallback would lose them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(
    const at::Tensor& input, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mean,
    const std::optional<at::Tensor>& variance, bool training, double momentum, double eps) {
  check_device(input, "the input");
  for (const auto& tensor : {weight, bias, mean, variance}) check_device(tensor, "batch norm's");
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  auto [output, saved_mean, saved_scale] =
      at::native_batch_norm(on_host(input), on_host(weight), on_host(bias), on_host(mean),
                            on_host(variance), training, momentum, eps);
  return {on_device(output), on_device(saved_mean), on_device(saved_scale)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &read_number);
  library.impl("resize_", &resize);
  library.impl("native_batch_norm", &batch_norm);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  library.impl("view", &at::native::view);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  library.impl("set_.source_Tensor", &at::native::set_tensor_);
  library.impl("set_.source_Storage", &at::native::set_);
}

// What autocast casts on CUDA, as far as the networks here use it.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // `m` is the name that the macro expects
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(nll_loss, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  module.def("forbid_float64", [](bool forbidden) { float64_is_forbidden = forbidden; });
  module.def("limit_memory", [](int64_t more) { bytes_at_most = more ? bytes_in_use + more : 0; });
  module.def("default_generator", [] { return hooks.getDefaultGenerator(0); });
}
