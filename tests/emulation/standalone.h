// For programs that drive exported kernels with neither torch nor Python: build.build_program.
#pragma once

#include <initializer_list>

#include "registry.h"

namespace pydl {

// The export of that name; fails where there is none.
const Entry& find(const char* name);

inline Arg arg(const View& view) {
  Arg a;
  a.view = view;
  return a;
}
inline Arg arg(double number) {
  Arg a;
  a.number = number;
  return a;
}
inline Arg arg(int64_t integer) {
  Arg a;
  a.integer = integer;
  return a;
}

void call(const char* name, std::initializer_list<Arg> args);

}  // namespace pydl
