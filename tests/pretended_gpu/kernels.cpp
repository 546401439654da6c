// A "cuda" device in a PyTorch built without CUDA: an allocator that counts, and kernels that do their work on the CPU.
//
// As on a GPU, tensors of two devices do not mix, autograd runs on a thread of its own, autocast is CUDA's, and a look at a
// value is counted as a synchronisation. Asynchrony, CUDA's libraries and their numbers are not pretended. See run.py.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_map>

using at::Tensor;

namespace {

const c10::Device kDevice(c10::kCUDA, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

// ---- memory, in blocks of 512 bytes as CUDA's allocator gives it out

std::mutex allocations_lock;
std::unordered_map<void*, int64_t> allocations;
int64_t allocated = 0, allocated_at_most = 0;
std::atomic<int64_t> synchronizations{0};

void release(void* address) {
  if (address == nullptr) return;
  int64_t size = 0, total = 0;
  {
    std::lock_guard<std::mutex> guard(allocations_lock);
    auto found = allocations.find(address);
    size = found->second;
    allocations.erase(found);
    total = allocated -= size;
  }
  c10::reportMemoryUsageToProfiler(address, -size, total, total, kDevice);
  std::free(address);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (n == 0) return {nullptr, nullptr, &release, kDevice};
    void* address = nullptr;
    const int64_t size = (n + 511) / 512 * 512;
    TORCH_CHECK(posix_memalign(&address, 64, size) == 0, "out of memory");
    int64_t total = 0;
    {
      std::lock_guard<std::mutex> guard(allocations_lock);
      allocations[address] = size;
      total = allocated += size;
      allocated_at_most = std::max(allocated_at_most, total);
    }
    c10::reportMemoryUsageToProfiler(address, size, total, total, kDevice);
    return {address, address, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

Memory memory;
REGISTER_ALLOCATOR(c10::kCUDA, &memory);

// ---- one device with one stream

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// ---- kernels

thread_local int in_fallback = 0;

Tensor on_cpu(const Tensor& x) {  // the same memory
  if (!x.is_cuda()) return x;
  auto storage = x.storage();
  char* start = x.numel() == 0 ? nullptr : static_cast<char*>(storage.mutable_data()) + x.storage_offset() * x.itemsize();
  auto options = x.options().device(at::kCPU).requires_grad(false);
  Tensor y = at::from_blob(start, x.sizes(), x.strides(), [storage](void*) {}, options, at::Device(at::kCPU));
  y._set_conj(x.is_conj());
  y._set_neg(x.is_neg());
  return y;
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& x, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(x, size, stride, offset);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
  if (from.is_cuda() && to.is_cpu() && in_fallback == 0) synchronizations++;
  Tensor target = on_cpu(to);
  target.copy_(on_cpu(from).expand_as(target));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

const Tensor& resize_(const Tensor& x, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  if (x.sizes() == size) return x;
  auto storage = x.storage();
  const size_t needed = (c10::multiply_integers(size) + x.storage_offset()) * x.itemsize();
  if (needed > storage.nbytes()) {
    auto larger = memory.allocate(needed);
    if (storage.nbytes() > 0) std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(needed);
  }
  x.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format) x.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return x;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar look(const Tensor& x) {
  synchronizations++;
  return on_cpu(x).item();
}

Tensor& set_view(Tensor& x, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = x.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.data() != nullptr && stride.size() == size.size()) impl->set_sizes_and_strides(size, stride);
  else impl->set_sizes_contiguous(size);
  return x;
}

Tensor& set_tensor(Tensor& x, const Tensor& y) {
  return set_view(x, y.storage(), y.storage_offset(), y.sizes(), y.strides());
}

Tensor& set_storage(Tensor& x, at::Storage storage) {
  const int64_t n = storage.nbytes() / x.itemsize();
  return set_view(x, std::move(storage), 0, {n}, {});
}

Tensor& set_nothing(Tensor& x) {
  return set_view(x, c10::Storage(c10::Storage::use_byte_size_t(), 0, &memory, true), 0, {0}, {});
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> take_both{"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                               "aten::_copy_from_and_resize"};
  static const std::set<std::string> wait{"aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::equal"};
  const auto& name = op.schema().operator_name().name;
  const auto refuse = [&](const Tensor& x) {
    TORCH_CHECK(!x.defined() || !x.is_cpu() || x.dim() == 0 || take_both.count(name),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name, ")");
  };
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) refuse(argument.toTensor());
    else if (argument.isTensorList()) for (const Tensor& x : argument.toTensorVector()) refuse(x);
  }
  if (wait.count(name)) synchronizations++;
  struct Within {
    Within() { in_fallback++; }
    ~Within() { in_fallback--; }
  } within;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

namespace at {

struct PretendedHooks : CUDAHooksInterface {
  PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  void deviceSynchronize(DeviceIndex) const override {}
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendedHooks);

}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", [](const Tensor& x, at::IntArrayRef size) { return at::native::view(x, size); });
  library.impl("_reshape_alias", [](const Tensor& x, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::_reshape_alias(x, size, stride);
  });
  library.impl("unfold", [](const Tensor& x, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(x, dim, size, step);
  });
  library.impl("view_as_real", [](const Tensor& x) { return at::native::view_as_real(x); });
  library.impl("view_as_complex", [](const Tensor& x) { return at::native::view_as_complex(x); });
  library.impl("copy_", copy_);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("resize_", resize_);
  library.impl("_local_scalar_dense", look);
  library.impl("set_", set_nothing);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_view);
  // composed of other operations, or of a GPU's libraries, where no kernel is registered for the device
  for (const char* name : {"native_group_norm", "native_layer_norm", "convolution", "convolution_backward", "_convolution"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("allocated", [] { return allocated; });
  module.def("allocated_at_most", [] { return allocated_at_most; });
  module.def("reset_peak", [] { allocated_at_most = allocated; });
  module.def("synchronizations", [] { return synchronizations.load(); });
}
