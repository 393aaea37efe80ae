// The launchers of csrc/cuda on the emulated device, as C functions that describe themselves.
#include <cstring>
#include <string>

#include "../../../csrc/cuda/api.h"
#include "cuda_on_cpu.h"

namespace {

std::string message;  // of the last call that failed

// One letter for each argument: p address, d double, i integer; then that of the result.
template <typename T>
constexpr char letter() {
  if (std::is_pointer_v<T>) return 'p';
  return std::is_same_v<T, double> ? 'd' : std::is_void_v<T> ? 'v' : 'i';
}

template <auto function>
struct Call;

template <typename R, typename... A, R (*function)(A...)>
struct Call<function> {
  static constexpr char signature[] = {letter<A>()..., letter<R>(), 0};

  // 0, or 1 with a message.
  static int run(A... arguments, int64_t* result) {
    try {
      if constexpr (std::is_void_v<R>)
        function(arguments...);
      else
        *result = function(arguments...);
    } catch (const std::exception& error) {
      message = error.what();
      return 1;
    }
    return 0;
  }
};

struct Entry {
  const char* name;
  const char* signature;
  void* run;
};

#define ENTRY(name)                                 \
  {#name, Call<&fastminima::cuda::name>::signature, \
   reinterpret_cast<void*>(&Call<&fastminima::cuda::name>::run)},
const Entry entries[] = {FM_EACH_LAUNCHER(ENTRY){nullptr, nullptr, nullptr}};

}  // namespace

extern "C" {
const char* entry_name(int i) { return entries[i].name; }
const char* entry_signature(int i) { return entries[i].signature; }
void* entry_address(int i) { return entries[i].run; }
const char* last_message() { return message.c_str(); }
void set_schedule(const char* name, int seed) {
  cuda_on_cpu::machine().schedule = name;
  cuda_on_cpu::machine().random.seed(unsigned(seed));
}
uint16_t half_bits(float x) { return cuda_on_cpu::half_bits(x); }
}
