#include "host/launches.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace fastminima {
namespace host {
namespace {

// CUresult cuLaunchKernel(function, grid, block, shared bytes, stream, arguments, extra).
using Driver = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       void*, void**, void**);
// CUresult cuStreamIsCapturing(stream, status): 0 where it is not.
using Capturing = int (*)(void*, int*);

constexpr size_t kMostArguments = 64;

Driver injected = nullptr;
Capturing injected_capturing = nullptr;

bool is_same(const dlpack::Device& a, const dlpack::Device& b) {
  return a.type == b.type && a.id == b.id;
}

bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % Likeness::kAlignment == 0;
}

void* of_library(const char* name) {
  static void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  return library ? dlsym(library, name) : nullptr;
}

Driver found() {
  static Driver launch = reinterpret_cast<Driver>(of_library("cuLaunchKernel"));
  return injected ? injected : launch;
}

// Lets other Python threads run as long as it is there.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

std::atomic<int64_t> counted{0};

int count(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
          void**, void**) {
  counted++;
  return 0;
}

}  // namespace

void* counting_driver() { return reinterpret_cast<void*>(&count); }
int64_t launches_counted() { return counted; }

void use_driver(void* launch, void* is_capturing) {
  injected = reinterpret_cast<Driver>(launch);
  injected_capturing = reinterpret_cast<Capturing>(is_capturing);
}

bool has_driver() { return found() != nullptr; }

bool is_captured(void* stream, bool& out) {
  static auto told = reinterpret_cast<Capturing>(of_library("cuStreamIsCapturing"));
  int status = 0;
  if (Capturing ask = injected ? injected_capturing : told; ask && ask(stream, &status) != 0)
    return false;
  out = status != 0;
  return true;
}

Likeness::Likeness(const dlpack::Tensor& x)
    : device_(x.device),
      dtype_(x.dtype),
      address_(reinterpret_cast<uintptr_t>(x.data) % kAlignment),
      shape_(x.shape, x.shape + x.ndim),
      strides_(x.strides, x.strides + x.ndim) {}

bool Likeness::holds(const dlpack::Tensor& x) const {
  if (!is_same(x.device, device_)) return false;
  if (x.dtype.code != dtype_.code || x.dtype.bits != dtype_.bits || x.dtype.lanes != dtype_.lanes)
    return false;
  if (x.ndim != static_cast<int>(shape_.size())) return false;
  if (reinterpret_cast<uintptr_t>(x.data) % kAlignment != address_) return false;
  for (int i = 0; i < x.ndim; i++)
    if (x.shape[i] != shape_[i] || x.strides[i] != strides_[i]) return false;
  return true;
}

Launches::Launches(std::vector<Likeness> inputs, std::vector<Launch> launches,
                   std::vector<int64_t> places, int64_t bytes, PyObject* kept)
    : inputs_(std::move(inputs)),
      launches_(std::move(launches)),
      places_(std::move(places)),
      bytes_(bytes),
      kept_(Py_NewRef(kept)) {
  for (const Launch& launch : launches_) {
    if (launch.arguments.size() > kMostArguments || launch.arguments.empty())
      throw std::invalid_argument("a kernel takes 1 to 64 arguments");
    for (const auto& [argument, to] : launch.pointers) {
      size_t most = to.where == Pointer::input    ? inputs_.size()
                    : to.where == Pointer::output ? places_.size()
                                                  : 1;
      if (argument >= launch.arguments.size() || to.number < 0 ||
          to.number >= static_cast<int64_t>(most))
        throw std::invalid_argument("a pointer to nothing that is known");
    }
  }
}

bool Launches::fits(const dlpack::Tensor* inputs, void* const* outputs,
                    const DeviceMemory& memory) const {
  if (memory.bytes < bytes_ || !is_aligned(memory.scratch)) return false;
  for (size_t i = 0; i < places_.size(); i++)
    if (!is_aligned(outputs[i])) return false;
  for (size_t i = 0; i < inputs_.size(); i++)
    if (!inputs_[i].holds(inputs[i]) || !is_same(inputs[i].device, memory.device)) return false;
  return true;
}

bool Launches::run(const dlpack::Tensor* inputs, void* const* outputs,
                   const DeviceMemory& memory) const {
  Driver driver = found();
  if (driver == nullptr || !fits(inputs, outputs, memory)) return false;
  WithoutGil meanwhile;
  for (const Launch& launch : launches_) {
    uint64_t arguments[kMostArguments];
    void* addresses[kMostArguments];
    for (size_t i = 0; i < launch.arguments.size(); i++) {
      arguments[i] = launch.arguments[i];
      addresses[i] = &arguments[i];
    }
    for (const auto& [argument, to] : launch.pointers) {
      const void* base = to.where == Pointer::input    ? inputs[to.number].data
                         : to.where == Pointer::output ? outputs[to.number]
                                                       : memory.scratch;
      arguments[argument] = reinterpret_cast<uintptr_t>(base) + to.offset;
    }
    const unsigned* grid = launch.grid;
    if (grid[0] == 0) {
      arguments[launch.arguments.size() - 1] = reinterpret_cast<uintptr_t>(memory.stream);
      reinterpret_cast<void (*)(const uint64_t*)>(launch.function)(arguments);
      continue;
    }
    int code = driver(launch.function, grid[0], grid[1], grid[2], launch.threads, 1, 1,
                      launch.shared, memory.stream, addresses, nullptr);
    if (code != 0)
      throw std::runtime_error("cuLaunchKernel failed with CUresult " + std::to_string(code) +
                               ": an earlier kernel may have failed.");
  }
  return true;
}

}  // namespace host
}  // namespace fastminima
