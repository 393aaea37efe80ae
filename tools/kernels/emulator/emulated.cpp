// The launchers of csrc/cuda on the emulated device, as C functions that describe themselves.
#include <cstring>
#include <string>

#include "../../../csrc/cuda/api.h"
#include "../../../csrc/words.h"
#include "cuda_on_cpu.h"

namespace {

std::string message;  // of the last call that failed

template <auto function>
struct Call;

template <typename R, typename... A, R (*function)(A...)>
struct Call<function> {
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

void* by_words(void (*function)(const uint64_t*)) { return reinterpret_cast<void*>(function); }

struct Entry {
  const char* name;
  const char* signature;
  void *run, *by_words;
};

#define ENTRY(name)                                              \
  {#name, fastminima::Words<&fastminima::cuda::name>::letters,   \
   reinterpret_cast<void*>(&Call<&fastminima::cuda::name>::run), \
   by_words(&fastminima::Words<&fastminima::cuda::name>::call)},
const Entry entries[] = {FM_EACH_LAUNCHER(ENTRY){nullptr, nullptr, nullptr, nullptr}};

}  // namespace

extern "C" {
const char* entry_name(int i) { return entries[i].name; }
const char* entry_signature(int i) { return entries[i].signature; }
void* entry_address(int i) { return entries[i].run; }
void* entry_by_words(int i) { return entries[i].by_words; }
const char* last_message() { return message.c_str(); }
void set_schedule(const char* name, int seed) {
  cuda_on_cpu::machine().schedule = name;
  cuda_on_cpu::machine().random.seed(unsigned(seed));
}
uint16_t half_bits(float x) { return cuda_on_cpu::half_bits(x); }
}
