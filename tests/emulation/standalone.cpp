#include "standalone.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace pydl {
namespace {
const Entry* entries = nullptr;
}

bool enlist(Entry* entry) {
  entry->next = entries;
  entries = entry;
  return true;
}

void fail(const char* format, ...) {
  char message[1024];
  va_list rest;
  va_start(rest, format);
  vsnprintf(message, sizeof message, format, rest);
  va_end(rest);
  throw std::runtime_error(message);
}

const Entry& find(const char* name) {
  for (const Entry* entry = entries; entry != nullptr; entry = entry->next)
    if (strcmp(entry->name, name) == 0) return *entry;
  fail("nothing is exported as %s", name);
}

void call(const char* name, std::initializer_list<Arg> args) {
  const Entry& entry = find(name);
  if (strlen(entry.kinds) != args.size()) {
    fail("%s takes %zu arguments (%s), not %zu", name, strlen(entry.kinds), entry.names,
         args.size());
  }
  entry.call(Stream{}, args.begin());
}

}  // namespace pydl
