// Functions that are called with their arguments as 64-bit words, as repeated launches keep them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace fastminima {

template <typename T>
T from_word(uint64_t word) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(word);
  } else if constexpr (std::is_floating_point_v<T>) {
    static_assert(sizeof(T) == sizeof(word));
    T x;
    std::memcpy(&x, &word, sizeof(x));
    return x;
  } else {
    return static_cast<T>(word);
  }
}

template <auto function>
struct Words;

template <typename R, typename... A, R (*function)(A...)>
struct Words<function> {
  template <typename T>
  static constexpr char letter() {
    if (std::is_pointer_v<T>) return 'p';
    return std::is_floating_point_v<T> ? 'd' : std::is_void_v<T> ? 'v' : 'i';
  }
  // One letter for each argument: p address, d double, i integer; then that of the result.
  static constexpr char letters[] = {letter<A>()..., letter<R>(), 0};

  static void call(const uint64_t* words) { call(words, std::index_sequence_for<A...>()); }

 private:
  template <size_t... i>
  static void call(const uint64_t* words, std::index_sequence<i...>) {
    function(from_word<A>(words[i])...);
  }
};

}  // namespace fastminima
