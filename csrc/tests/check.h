// The whole test framework: expect() counts failures, finish() turns them into an exit code. HYBRID_TEST_FAIL_FAST=1 ends the
// program at the first failure, for those who only ask whether there is one.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <source_location>

namespace hybrid::testing {

inline int failures = 0;

inline void expect(bool good, const char* what,
                   const std::source_location where = std::source_location::current()) {
  if (good) return;
  ++failures;
  std::fprintf(stderr, "%s:%u: %s\n", where.file_name(), static_cast<unsigned>(where.line()), what);
  if (std::getenv("HYBRID_TEST_FAIL_FAST") != nullptr) std::_Exit(1);
}

inline int finish() {
  if (failures > 0) std::fprintf(stderr, "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace hybrid::testing
