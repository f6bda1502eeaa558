// Memory, generators, streams and events of the simulated devices, and what torch asks of a device type.
#include "device.h"

#include <cstdlib>
#include <cstring>
#include <map>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace sim {

using c10::Device, c10::DeviceIndex, c10::Stream;

thread_local DeviceIndex current = 0;
thread_local std::array<c10::StreamId, kNumDevices> current_streams{};

DeviceIndex checked(DeviceIndex device) {
  state(device);
  return device;
}

// ---- memory

struct Block { void* data; size_t size; int device; };

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  std::lock_guard lock(state(block->device).mutex);
  state(block->device).memory.allocated_bytes[kAll].decrease(block->size);
  std::free(block->data);
  delete block;
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    const Device device(kType, current);
    if (size == 0) return {nullptr, device};
    auto& owner = state(current);
    std::lock_guard lock(owner.mutex);
    const size_t used = owner.memory.allocated_bytes[kAll].current;
    TORCH_CHECK_WITH(OutOfMemoryError, used + size <= owner.limit, "sim out of memory. Tried to allocate ", size,
                     " bytes; ", used, " of ", owner.limit, " are in use on ", device);
    auto* block = new Block{std::malloc(size), size, current};
    owner.memory.allocated_bytes[kAll].increase(size);
    return {block->data, block, release, device};
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, Stream stream) override { count(kRecords, stream.device_index()); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override { return state(device).memory; }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override { state(device).memory.allocated_bytes[kAll].reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    return {state(device).limit - state(device).memory.allocated_bytes[kAll].current, state(device).limit};
  }
} device_memory;

REGISTER_ALLOCATOR(kType, &device_memory);

struct PinnedMemory final : c10::Allocator {
  // Never destroyed: tensors may outlive the interpreter.
  static inline auto& mutex = *new std::mutex;
  static inline auto& blocks = *new std::map<const char*, size_t>;  // by where they begin

  c10::DataPtr allocate(size_t size) override {
    auto* data = static_cast<char*>(std::aligned_alloc(64, size / 64 * 64 + 64));
    std::memset(data, 0xff, size);  // NaN: nobody takes it for the result of a copy that has not been made
    std::lock_guard lock(mutex);
    blocks[data] = size;
    return {data, data, free, Device(c10::kCPU)};
  }
  static void free(void* data) {
    std::lock_guard lock(mutex);
    blocks.erase(static_cast<char*>(data));
    std::free(data);
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
} pinned;

// ---- generators: those of the host, under another name

struct SimGenerator final : c10::GeneratorImpl {
  explicit SimGenerator(DeviceIndex device, at::Generator host = at::detail::createCPUGenerator())
      : GeneratorImpl({kType, device}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  SimGenerator* clone_impl() const override { return new SimGenerator(device_.index(), host.clone()); }

  at::Generator host;
};

// ---- streams and events: a device works in one order, whatever the stream

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  Device exchangeDevice(Device to) const override { return {kType, std::exchange(current, checked(to.index()))}; }
  Device getDevice() const override { return {kType, current}; }
  void setDevice(Device device) const override { current = checked(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return kNumDevices; }

  Stream getStream(Device device) const override {
    return Stream(Stream::UNSAFE, resolve(device), current_streams[resolve(device).index()]);
  }
  Stream getNewStream(Device device, int) const override {
    count(kStreams, resolve(device).index());
    return Stream(Stream::UNSAFE, resolve(device), state(resolve(device).index()).counts[kStreams]);
  }
  Stream exchangeStream(Stream stream) const override {
    return Stream(Stream::UNSAFE, stream.device(), std::exchange(current_streams[stream.device_index()], stream.id()));
  }
  bool queryStream(const Stream& stream) const override { return is_done(stream.device_index()); }
  void synchronizeStream(const Stream& stream) const override { wait(stream.device_index()); }
  void synchronizeDevice(const DeviceIndex device) const override { wait(device); }

  // An event is the number of its device, counted from 1.
  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(intptr_t{stream.device_index()} + 1);
    count(kEvents, stream.device_index());
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void* event) const override { return event == nullptr || is_done(of(event)); }
  void synchronizeEvent(void* event) const override { wait(of(event)); }

 private:
  static int of(void* event) { return static_cast<int>(reinterpret_cast<intptr_t>(event)) - 1; }
  // Who polls is told no once, and that all is done the next time.
  static bool is_done(int device) { return catch_up(device, kToDevice) + catch_up(device, kToHost) == 0; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kNumDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = checked(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current, checked(device)); }
  DeviceIndex maybeExchangeDevice(DeviceIndex to) const override { return to < 0 ? current : exchangeDevice(to); }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard lock(pinned.mutex);
    const auto after = pinned.blocks.upper_bound(static_cast<const char*>(data));
    return after != pinned.blocks.begin() && data < std::prev(after)->first + std::prev(after)->second;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    return state(device < 0 ? current : device).generator;
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<SimGenerator>(device < 0 ? current : checked(device));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), size);
  }
};

const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);


State& state(int device) {
  static auto& states = *[] {
    auto* made = new std::array<State, kNumDevices>;
    for (int index = 0; index < kNumDevices; ++index)
      made->at(index).generator = at::make_generator<SimGenerator>(index);
    return made;
  }();
  TORCH_CHECK(device >= 0 && device < kNumDevices, "sim error: invalid device ordinal ", device, " of ", kNumDevices);
  return states[device];
}

at::Generator drawing(const at::Generator& generator) { return generator.get<SimGenerator>()->host; }

void later(int device, Direction direction, std::function<void()> copy) {
  std::lock_guard lock(state(device).mutex);
  state(device).copies[direction].push_back(std::move(copy));
}

size_t catch_up(int device, Direction direction) {
  std::vector<std::function<void()>> due;
  std::lock_guard order(state(device).copying);  // who comes second finds them made
  std::unique_lock lock(state(device).mutex);
  due.swap(state(device).copies[direction]);
  lock.unlock();
  at::AutoDispatchBelowADInplaceOrView guard;
  for (auto& copy : due) copy();
  return due.size();
}

void wait(int device) {
  count(kSyncs, device);
  catch_up(device, kToDevice);
  catch_up(device, kToHost);
}

Device resolve(std::optional<Device> device) {
  return {kType, device && device->has_index() ? checked(device->index()) : current};
}

TORCH_LIBRARY(sim, m) { m.def("generator(int of) -> Generator?", [](int64_t of) { return state(int(of)).generator; }); }

}  // namespace sim

// For ctypes, past the dispatcher: a mode of the caller's does not see that somebody counts.
extern "C" int64_t sim_count(int counter, int device) { return sim::state(device).counts[counter]; }
extern "C" void sim_reset_counts(int device) { for (auto& count : sim::state(device).counts) count = 0; }
extern "C" void sim_limit_memory(int device, size_t size) { sim::state(device).limit = size; }
