// The whole test framework: expect() counts failures, finish() turns them into an exit code.
#pragma once
#include <cstdio>
#include <source_location>

namespace hybrid::testing {

inline int failures = 0;

inline void expect(bool good, const char* what,
                   const std::source_location where = std::source_location::current()) {
  if (good) return;
  ++failures;
  std::fprintf(stderr, "%s:%u: %s\n", where.file_name(), static_cast<unsigned>(where.line()), what);
}

inline int finish() {
  if (failures > 0) std::fprintf(stderr, "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace hybrid::testing
