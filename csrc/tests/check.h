// Named tests and checks that say what was got and what was expected. A program is its TESTs and
// `int main() { return check::run(); }`.
#pragma once

#include <cstdio>
#include <limits>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test> tests;
inline long failures;  // of the running test
constexpr long kShown = 5;

template <typename T>
void show(std::ostream& out, const T& value) {
  if constexpr (std::is_same_v<T, bool>) {
    out << (value ? "true" : "false");
  } else if constexpr (std::is_unsigned_v<T>) {  // bits
    out << "0x" << std::hex << +value << std::dec;
  } else if constexpr (std::is_arithmetic_v<T>) {
    out << +value;
  } else {
    out << value;
  }
}

// `where` names the case within a loop: texts and values in turn.
template <typename Got, typename Want, typename... Where>
void expect(bool good, const char* file, int line, const char* what, const Got& got, const char* relation,
            const Want& want, const Where&... where) {
  if (good || ++failures > kShown) return;
  std::ostringstream text;
  text.precision(std::numeric_limits<double>::max_digits10);
  text << file << ":" << line << ": " << what << ": got ";
  show(text, got);
  text << ", expected " << relation;
  show(text, want);
  if (sizeof...(where) > 0) text << ", at ";
  (show(text, where), ...);
  std::fprintf(stderr, "%s\n", text.str().c_str());
}

inline int run() {
  int failed = 0;
  for (const Test& test : tests) {
    failures = 0;
    test.body();
    if (failures > 0) std::fprintf(stderr, "FAILED %s: %ld checks\n", test.name, failures);
    failed += failures > 0;
  }
  std::printf("%d of %zu tests failed\n", failed, tests.size());
  return failed > 0 || tests.empty();
}

}  // namespace check

#define TEST(name)                                                                                 \
  static void name();                                                                              \
  [[maybe_unused]] static const bool name##_added = (check::tests.push_back({#name, name}), true); \
  static void name()

// CHECK_EQ(got, want, where...) and CHECK_LE(got, most, where...); a NaN satisfies neither.
#define CHECK_EQ(got, ...) CHECK_RELATION_(==, "", got, __VA_ARGS__)
#define CHECK_LE(got, ...) CHECK_RELATION_(<=, "at most ", got, __VA_ARGS__)
#define CHECK_RELATION_(op, relation, got, ...)                                \
  [](const auto& g, const auto& w, const auto&... where) {                     \
    check::expect(g op w, __FILE__, __LINE__, #got, g, relation, w, where...); \
  }(got, __VA_ARGS__)
