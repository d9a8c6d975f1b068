// A device type of its own for the simulated accelerator: memory with a budget, device guard, pinned host memory, views.
//
// [Note: Device pointers] Device memory is ordinary host memory, but `tensor.data_ptr()` has bit 62 set: code that
// goes round the dispatcher and follows a device pointer on the host dies at once, as it would with a real device.
// `lower` gives the simulator itself a CPU tensor over the true bytes.
//
// [Note: Freed blocks] A freed block goes, as with torch's caching allocator, to the stream that it was allocated on
// and may be used again by what is queued there next. Destructors can't take the GIL, so they leave freed blocks in a
// list; the Python queue takes the list before it queues anything, poisons each block before the next operation of its
// stream, and only then gives it back for reuse. Blocks never go back to the system while a queued operation can touch them.
//
// [Note: Devices] There are kDevices of them, each with its default stream, whose id is the device's index. Every thread
// starts on device 0, as with CUDA. All share one memory and one budget: a process is meant to use one of them.
//
// [Note: Pinned blocks] Page-locked memory is counted as torch's CachingHostAllocator takes it: rounded up to a power of
// two, and never given back, but used again for another request of the same rounded size.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace py = pybind11;

namespace {

constexpr uintptr_t kDeviceBit = uintptr_t(1) << 62;
constexpr size_t kAlignment = 64;
constexpr size_t kMaxCachedBytes = size_t(256) << 20;
constexpr c10::DeviceIndex kDevices = 4;

c10::Device device_at(c10::DeviceIndex index) {
  return c10::Device(c10::DeviceType::PrivateUse1, index);
}

size_t power_of_two(size_t size) {
  size_t rounded = 1;
  while (rounded < size) {
    rounded *= 2;
  }
  return rounded;
}

struct Block {
  int64_t id;
  char* bytes;
  size_t size;
  int64_t stream;
  std::set<int64_t> recorded_streams;
  ~Block() {
    std::free(bytes);
  }
};
using BlockPtr = std::shared_ptr<Block>;

// Leaked on purpose: tensors are destroyed after static objects.
struct State {
  std::mutex mutex;
  size_t budget = size_t(1) << 40;
  size_t allocated = 0; // held by tensors
  size_t active = 0; // the same and freed blocks that a recorded stream may still use
  size_t peak = 0;
  size_t allocations = 0;
  int64_t next_block = 1;
  int64_t next_stream = kDevices;
  std::vector<BlockPtr> freed;
  std::map<int64_t, BlockPtr> passing; // taken by the queue, not yet given back
  std::map<std::pair<int64_t, size_t>, std::vector<BlockPtr>> free_blocks;
  size_t cached = 0;
  std::map<uintptr_t, std::pair<size_t, int64_t>> pinned; // base -> size, id
  size_t pinned_bytes = 0;
  std::map<size_t, size_t> spare_pinned; // rounded size -> blocks of it that were freed: [Note: Pinned blocks]
  size_t pinned_taken_bytes = 0;
  size_t pinned_allocations = 0;
  std::vector<std::pair<std::string, int>> order; // what touched a device, at its first time: (what, index)
  py::object* queue = nullptr;
};

State& state() {
  static State* instance = new State();
  return *instance;
}

thread_local c10::DeviceIndex current_device = 0;
thread_local int64_t current_streams[kDevices] = {0, 1, 2, 3};

int64_t current_stream() {
  return current_streams[current_device];
}

struct OnDevice {
  c10::DeviceIndex previous = current_device;
  explicit OnDevice(c10::DeviceIndex index) {
    current_device = index < 0 ? current_device : index;
  }
  ~OnDevice() {
    current_device = previous;
  }
};

// Note `what`, unless it is known of this device. The caller holds the lock.
void touch(const std::string& what, int index) {
  auto& order = state().order;
  auto entry = std::make_pair(what, index);
  if (std::find(order.begin(), order.end(), entry) == order.end()) {
    order.push_back(std::move(entry));
  }
}

BlockPtr& block_of(void* context) {
  return *static_cast<BlockPtr*>(context);
}

void release_device(void* context) {
  auto* held = static_cast<BlockPtr*>(context);
  {
    State& s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.allocated -= (*held)->size;
    if ((*held)->recorded_streams.empty()) {
      s.active -= (*held)->size;
    }
    s.freed.push_back(*held);
  }
  delete held;
}

void release_alias(void* context) {
  delete static_cast<BlockPtr*>(context);
}

char* aligned_bytes(size_t size) {
  void* bytes = nullptr;
  TORCH_CHECK(posix_memalign(&bytes, kAlignment, std::max<size_t>(size, 1)) == 0, "the host is out of memory");
  return static_cast<char*>(bytes);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) {
      return {nullptr, nullptr, &release_nothing, device_at(current_device)};
    }
    State& s = state();
    std::unique_lock<std::mutex> lock(s.mutex);
    if (s.active + size > s.budget && s.queue != nullptr) {
      lock.unlock();
      py::gil_scoped_acquire gil;
      s.queue->attr("on_memory_pressure")();
      lock.lock();
    }
    if (s.active + size > s.budget) {
      C10_THROW_ERROR(
          OutOfMemoryError,
          c10::str(
              "the simulated accelerator is out of memory: tried to allocate ", size, " bytes, ", s.allocated,
              " of the budget of ", s.budget, " bytes are allocated, and ", s.active - s.allocated,
              " more wait for recorded streams"));
    }
    s.allocated += size;
    s.active += size;
    s.peak = std::max(s.peak, s.allocated);
    s.allocations++;
    touch("tensor", current_device);
    auto& spare = s.free_blocks[{current_stream(), size}];
    BlockPtr block;
    if (spare.empty()) {
      block = BlockPtr(new Block{s.next_block++, aligned_bytes(size), size, current_stream(), {}});
      std::memset(block->bytes, 0xFF, size);
    } else {
      block = spare.back();
      spare.pop_back();
      s.cached -= size;
    }
    void* pointer = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(block->bytes) | kDeviceBit);
    return {pointer, new BlockPtr(block), &release_device, device_at(current_device)};
  }
  static void release_nothing(void*) {}
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void*, const void*, std::size_t) const override {
    TORCH_CHECK(false, "the simulated accelerator copies through its queue only");
  }
};

DeviceMemory device_memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &device_memory)

struct PinnedMemory final : c10::Allocator {
  static void release(void* bytes) {
    State& s = state();
    {
      std::lock_guard<std::mutex> lock(s.mutex);
      auto found = s.pinned.find(reinterpret_cast<uintptr_t>(bytes));
      s.pinned_bytes -= found->second.first;
      s.spare_pinned[power_of_two(found->second.first)]++;
      s.pinned.erase(found);
    }
    std::free(bytes);
  }
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) {
      return {nullptr, nullptr, &DeviceMemory::release_nothing, c10::Device(c10::DeviceType::CPU)};
    }
    char* bytes = aligned_bytes(size);
    std::memset(bytes, 0xFF, size);
    State& s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.pinned[reinterpret_cast<uintptr_t>(bytes)] = {size, s.next_block++};
    s.pinned_bytes += size;
    auto& spare = s.spare_pinned[power_of_two(size)];
    if (spare > 0) {
      spare--;
    } else {
      s.pinned_allocations++;
      s.pinned_taken_bytes += power_of_two(size);
    }
    return {bytes, bytes, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* target, const void* source, std::size_t size) const override {
    default_copy_data(target, source, size);
  }
};

PinnedMemory pinned_memory;

// Id and base address of the pinned allocation that `data` points into; id 0 where it is not pinned.
std::pair<int64_t, uintptr_t> pinned_allocation(const void* data) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  auto address = reinterpret_cast<uintptr_t>(data);
  auto next = s.pinned.upper_bound(address);
  if (next == s.pinned.begin()) {
    return {0, 0};
  }
  auto found = std::prev(next);
  bool inside = address < found->first + found->second.first;
  return inside ? std::make_pair(found->second.second, found->first) : std::make_pair(int64_t(0), uintptr_t(0));
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  bool isPinnedPtr(const void* data) const override {
    return pinned_allocation(data).first != 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_memory;
  }
  at::Device getDeviceFromPtr(void*) const override {
    return device_at(current_device);
  }
  c10::DeviceIndex deviceCount() const override {
    return kDevices;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_device;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return std::exchange(current_device, index < 0 ? current_device : index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    exchangeDevice(index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    py::gil_scoped_acquire gil;
    OnDevice guard(storage.device().index());
    auto data = device_memory.allocate(size);
    if (size > 0 && storage.nbytes() > 0) {
      state().queue->attr("synchronize")();  // else nothing is read: as on CUDA, the host goes on
      std::memcpy(
          block_of(data.get_context())->bytes, block_of(storage.data_ptr().get_context())->bytes,
          std::min(size, storage.nbytes()));
    }
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
  }
};

template <typename... Args>
py::object ask(const char* method, Args... args) {
  return state().queue->attr(method)(args...);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return c10::DeviceType::PrivateUse1;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto previous = device_at(current_device);
    uncheckedSetDevice(device);
    return previous;
  }
  c10::Device getDevice() const override {
    return device_at(current_device);
  }
  void setDevice(c10::Device device) const override {
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.has_index() ? device.index() : current_device;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }
  static c10::DeviceIndex index_of(c10::Device device) {
    return device.has_index() ? device.index() : current_device;
  }
  static c10::Stream stream(int64_t id, c10::DeviceIndex index) {
    return c10::Stream(c10::Stream::UNSAFE, device_at(index), id);
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream(current_streams[index_of(device)], index_of(device));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream(index_of(device), index_of(device));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    std::lock_guard<std::mutex> lock(state().mutex);
    return stream(state().next_stream++, index_of(device));
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto index = next.device_index();
    return stream(std::exchange(current_streams[index], next.id()), index);
  }
  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    py::gil_scoped_acquire gil;
    if (*event == nullptr) {
      *event = new py::object(ask("new_event"));
    }
    ask("record", *static_cast<py::object*>(*event), on.id());
  }
  void block(void* event, const c10::Stream& on) const override {
    if (event != nullptr) {
      py::gil_scoped_acquire gil;
      ask("wait", *static_cast<py::object*>(event), on.id());
    }
  }
  bool queryEvent(void* event) const override {
    py::gil_scoped_acquire gil;
    return event == nullptr || ask("query_event", *static_cast<py::object*>(event)).cast<bool>();
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      py::gil_scoped_acquire gil;
      ask("synchronize_event", *static_cast<py::object*>(event));
    }
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    if (event != nullptr && Py_IsInitialized()) {
      py::gil_scoped_acquire gil;
      delete static_cast<py::object*>(event);
    }
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override {
    return 1.0; // milliseconds, made up: simulated work has an order and no duration
  }
  bool queryStream(const c10::Stream& which) const override {
    py::gil_scoped_acquire gil;
    return ask("query_stream", which.id()).cast<bool>();
  }
  void synchronizeStream(const c10::Stream& which) const override {
    py::gil_scoped_acquire gil;
    ask("synchronize_stream", which.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    py::gil_scoped_acquire gil;
    ask("synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& which) const override {
    if (data.get_context() == nullptr) {
      return;
    }
    State& s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    auto& block = block_of(data.get_context());
    if (which.id() != block->stream) {
      block->recorded_streams.insert(which.id());
    }
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ------------------------------------------------------------------ operators that touch no element

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    c10::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  OnDevice guard(device ? device->index() : -1);
  return at::detail::empty_generic(size, &device_memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  OnDevice guard(device ? device->index() : -1);
  return at::detail::empty_strided_generic(size, stride, &device_memory, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::make_optional(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(
    const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!format || *format == at::MemoryFormat::Contiguous, "resize_ to another memory format");
  auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() == size) {
    return self;
  }
  impl->set_sizes_contiguous(size);
  size_t needed = at::detail::computeStorageNbytesContiguous(size, self.element_size(), self.storage_offset());
  if (needed > self.storage().nbytes()) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), needed);
  }
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !sizes.empty()) {
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride));
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  int64_t numel = source.nbytes() / self.element_size();
  return set_storage(self, std::move(source), 0, {c10::SymInt(numel)}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage(self, at::detail::empty_generic({0}, &device_memory, kKeys, at::kByte, {}).storage(), 0, {0}, {});
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  c10::impl::getDeviceGuardImpl(c10::DeviceType::PrivateUse1)
      ->recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

// `parameter.data = tensor` across device types, as between CPU and CUDA; torch allows it for the types it knows only
// (c10/core/TensorImpl.h, has_compatible_shallow_copy_type). `module.to` keeps parameter objects, tied ones, by it.
bool has_compatible_shallow_copy_type(const at::Tensor& self, const at::Tensor& from) {
  auto dense = [](const at::Tensor& tensor) {
    return tensor.layout() == c10::kStrided && (tensor.is_cpu() || tensor.is_privateuseone());
  };
  return (dense(self) && dense(from)) || self.unsafeGetTensorImpl()->has_compatible_shallow_copy_type(from.key_set());
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_has_compatible_shallow_copy_type", &has_compatible_shallow_copy_type);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_has_compatible_shallow_copy_type", &has_compatible_shallow_copy_type);
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("resize_", &resize);
  m.impl("set_", &set_nothing);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("record_stream", &record_stream);
}

// ------------------------------------------------------------------ what Python asks

at::Tensor over_bytes(BlockPtr block, size_t size) {
  char* bytes = block->bytes;
  c10::DataPtr data(bytes, new BlockPtr(std::move(block)), &release_alias, c10::Device(c10::DeviceType::CPU));
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), size, std::move(data), nullptr, /*resizable=*/false);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), caffe2::TypeMeta::Make<uint8_t>());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({int64_t(size)});
  return tensor;
}

// (first byte, last byte + 1) of `tensor` in its storage.
std::pair<int64_t, int64_t> extent(const at::Tensor& tensor) {
  int64_t first = tensor.storage_offset();
  int64_t last = first;
  for (int64_t dim = 0; dim < tensor.dim(); dim++) {
    if (tensor.size(dim) == 0) {
      return {first * tensor.element_size(), first * tensor.element_size()};
    }
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return {first * tensor.element_size(), (last + 1) * tensor.element_size()};
}

// A CPU tensor over the bytes of a device tensor, its block's id, and the extent in the block.
std::tuple<at::Tensor, int64_t, int64_t, int64_t> lower(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().type() == c10::DeviceType::PrivateUse1, "not a tensor of the simulated accelerator");
  auto options = tensor.options().device(at::kCPU);
  void* context = tensor.storage().data_ptr().get_context();
  if (context == nullptr) {
    return {at::empty_strided(tensor.sizes(), tensor.strides(), options), 0, 0, 0};
  }
  auto block = block_of(context);
  int64_t id = block->id;
  char* bytes = block->bytes;
  c10::DataPtr data(bytes, new BlockPtr(std::move(block)), &release_alias, c10::Device(c10::DeviceType::CPU));
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), nullptr, /*resizable=*/false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  auto [first, last] = extent(tensor);
  return {alias, id, first, last};
}

// Id and extent of a host tensor in its pinned allocation; id 0 where it is not pinned.
std::tuple<int64_t, int64_t, int64_t> pinned_extent(const at::Tensor& tensor) {
  auto [id, base] = pinned_allocation(tensor.storage().data());
  if (id == 0) {
    return {0, 0, 0};
  }
  auto [first, last] = extent(tensor);
  int64_t shift = reinterpret_cast<uintptr_t>(tensor.storage().data()) - base;
  return {id, first + shift, last + shift};
}

// A copy of a host scalar that takes part in type promotion as the original does.
at::Tensor snapshot(const at::Tensor& tensor) {
  auto copy = tensor.detach().clone();
  copy.unsafeGetTensorImpl()->set_wrapped_number(tensor.unsafeGetTensorImpl()->is_wrapped_number());
  return copy;
}

// The blocks freed since the last call: (id, size, stream, recorded streams, bytes). See [Note: Freed blocks].
py::list take_freed() {
  State& s = state();
  std::vector<BlockPtr> freed;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    freed.swap(s.freed);
    for (auto& block : freed) {
      s.passing[block->id] = block;
    }
  }
  py::list taken;
  for (auto& block : freed) {
    std::vector<int64_t> recorded(block->recorded_streams.begin(), block->recorded_streams.end());
    taken.append(py::make_tuple(block->id, block->size, block->stream, recorded, over_bytes(block, block->size)));
  }
  return taken;
}

bool any_freed() {
  return !state().freed.empty();
}

void recycle(int64_t id) {
  State& s = state();
  std::vector<BlockPtr> dropped; // destroyed after the lock
  std::lock_guard<std::mutex> lock(s.mutex);
  auto found = s.passing.find(id);
  auto block = found->second;
  s.passing.erase(found);
  if (!block->recorded_streams.empty()) {
    s.active -= block->size;
    block->recorded_streams.clear();
  }
  if (s.cached + block->size <= kMaxCachedBytes) {
    s.free_blocks[{block->stream, block->size}].push_back(block);
    s.cached += block->size;
  }
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("set_queue", [](py::object queue) { state().queue = new py::object(std::move(queue)); });
  m.def("lower", &lower);
  m.def("pinned_extent", &pinned_extent);
  m.def("snapshot", &snapshot);
  m.def("take_freed", &take_freed);
  m.def("any_freed", &any_freed);
  m.def("recycle", &recycle);
  m.def("current_stream", [](int index) { return current_streams[index]; });
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int index) {
    TORCH_CHECK(index >= 0 && index < kDevices, "there is no device ", index, ": the simulator has ", int(kDevices));
    current_device = index;
  });
  m.def("touch", [](const std::string& what, int index) {
    std::lock_guard<std::mutex> lock(state().mutex);
    touch(what, index);
  });
  m.def("order", [] { return state().order; });
  m.def("forget_order", [] { state().order.clear(); });
  m.def("device_count", [] { return int(kDevices); });
  m.def("set_budget", [](size_t bytes) { state().budget = bytes; });
  m.def("budget", [] { return state().budget; });
  m.def("allocated_bytes", [] { return state().allocated; });
  m.def("active_bytes", [] { return state().active; });
  m.def("peak_bytes", [] { return state().peak; });
  m.def("pinned_bytes", [] { return state().pinned_bytes; });
  m.def("pinned_taken_bytes", [] { return state().pinned_taken_bytes; });
  m.def("empty_pinned_cache", [] {
    State& s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    for (auto& [size, count] : s.spare_pinned) {
      s.pinned_taken_bytes -= size * count;
    }
    s.spare_pinned.clear();
  });
  m.def("pinned_allocations", [] { return state().pinned_allocations; });
  m.def("allocations", [] { return state().allocations; });
  m.def("reset_peak", [] { state().peak = state().allocated; });
}
