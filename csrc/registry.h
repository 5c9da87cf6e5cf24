// How a kernel file offers a function: EXPORT(backend, name, "argument names", &function).
// Nothing here knows torch; module.cpp turns every entry into torch.ops.pydl_<backend>.<name>.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pydl {

enum class DType : int8_t { f32, f16, bf16, f64, u8, i64, none };

// A tensor as kernels see it. Strides count elements; sizes and strides live as long as the call.
struct View {
  void* data = nullptr;
  DType dtype = DType::none;
  int32_t ndim = 0;
  int64_t numel = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
};

struct Out : View {};    // the function writes it; outputs come first
struct Maybe : View {};  // may be absent: data == nullptr and dtype == none

// The queue that work goes to (a cudaStream_t); never part of the schema.
struct Stream {
  void* handle = nullptr;
};

struct Arg {
  View view;
  double number = 0;
  int64_t integer = 0;
};

struct Entry {
  const char* backend;
  const char* name;
  const char* names;  // "y, x, negative_slope"
  const char* kinds;  // a letter an argument: o Out, v View, m Maybe, d double, i int64_t, b bool
  void (*call)(Stream stream, const Arg* args);
  int level;  // CPU instruction set it needs: 0 baseline, 1 AVX2, 2 AVX-512
  const Entry* next;
};

// Defined in module.cpp, compiled for the baseline: a static initialiser of a file that is compiled
// for AVX-512 must do nothing but call it, because it also runs where AVX-512 is missing.
bool enlist(Entry* entry);

// Raises a RuntimeError in Python.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace pydl

#ifndef PYDL_LEVEL
#define PYDL_LEVEL 0
#endif
// One file compiled for several instruction sets must not share inline functions between them.
#define PYDL_CONCAT_(a, b) a##b
#define PYDL_CONCAT(a, b) PYDL_CONCAT_(a, b)
#define PYDL_ISA PYDL_CONCAT(level, PYDL_LEVEL)

namespace pydl {
inline namespace PYDL_ISA {

template <class T>
constexpr char kind_of() {
  if (std::is_same_v<T, Out>) return 'o';
  if (std::is_same_v<T, View>) return 'v';
  if (std::is_same_v<T, Maybe>) return 'm';
  if (std::is_same_v<T, double>) return 'd';
  if (std::is_same_v<T, int64_t>) return 'i';
  if (std::is_same_v<T, bool>) return 'b';
  return '?';
}

template <class T>
inline T unpack(const Arg& arg) {
  if constexpr (std::is_base_of_v<View, T>) {
    T view;
    static_cast<View&>(view) = arg.view;
    return view;
  } else if constexpr (std::is_same_v<T, double>) {
    return arg.number;
  } else {
    return static_cast<T>(arg.integer);
  }
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};

template <auto Fn, class Type = decltype(Fn)>
struct Erased;

template <auto Fn, class... A>
struct Erased<Fn, void (*)(A...)> {
  static constexpr char kinds[sizeof...(A) + 1] = {kind_of<A>()..., 0};
  static void call(Stream, const Arg* args) { spread(args, typename Count<sizeof...(A)>::type{}); }
  template <int... I>
  static void spread(const Arg* args, Indices<I...>) {
    Fn(unpack<A>(args[I])...);
  }
};

template <auto Fn, class... A>
struct Erased<Fn, void (*)(Stream, A...)> {
  static constexpr char kinds[sizeof...(A) + 1] = {kind_of<A>()..., 0};
  static void call(Stream stream, const Arg* args) {
    spread(stream, args, typename Count<sizeof...(A)>::type{});
  }
  template <int... I>
  static void spread(Stream stream, const Arg* args, Indices<I...>) {
    Fn(stream, unpack<A>(args[I])...);
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl

// The function comes last and may hold commas: EXPORT(cpu, relu_fwd, "y, x", unary_fwd<Relu,
// double>). The entry is a constant of the file, so that nothing but the call runs at load.
#define EXPORT(backend, name, names, ...)                                                \
  namespace {                                                                            \
  constinit ::pydl::Entry PYDL_CONCAT(entry_, name){#backend,                            \
                                                    #name,                               \
                                                    names,                               \
                                                    ::pydl::Erased<&__VA_ARGS__>::kinds, \
                                                    &::pydl::Erased<&__VA_ARGS__>::call, \
                                                    PYDL_LEVEL,                          \
                                                    nullptr};                            \
  const bool PYDL_CONCAT(enlisted_, name) = ::pydl::enlist(&PYDL_CONCAT(entry_, name));  \
  }
