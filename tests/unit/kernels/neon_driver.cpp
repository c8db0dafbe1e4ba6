// Runs the kernels for another process, which may be of another architecture: calls come through standard input.
//
// A call: the function's name (32 bytes, zeros behind it), then how many segments and how many pointers (uint32 each);
// of every segment its size (uint64) and its bytes; of every pointer the segment and the offset where it lies and the
// segment that it leads to (uint64 each). Segment 0 holds the arguments, 8 bytes each. Back come the function's result
// (int32) and all segments but the first. Every segment ends where memory ends, so that no kernel reads past its data.

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <utility>

#include "native.h"

extern "C" const char* gemmakit_instruction_set();
extern "C" int gemmakit_use_instruction_set(const char* name);
#define DECLARE(name, parameters, arguments) extern "C" int name parameters;
GEMMAKIT_FUNCTIONS(DECLARE)

namespace {

constexpr uint32_t MOST = 128;

struct Segment {
  char *room, *bytes;
  size_t size, whole;
};

// The end of the input is the end of the work.
void get(void* to, size_t size) {
  if (size && fread(to, size, 1, stdin) != 1) _exit(0);
}

template <class T>
T get() {
  T value;
  get(&value, sizeof value);
  return value;
}

Segment get_segment() {
  size_t page = sysconf(_SC_PAGESIZE), size = get<uint64_t>(), whole = (size + page - 1) / page * page + page;
  char* room = (char*)mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED || mprotect(room + whole - page, page, PROT_NONE)) _exit(2);
  Segment made = {room, room + whole - page - size, size, whole};
  get(made.bytes, size);
  return made;
}

template <class T>
T argument(const char* words, size_t i) {
  T value;
  memcpy(&value, words + 8 * i, sizeof value);
  return value;
}

template <class... T, size_t... I>
int apply(int (*function)(T...), const char* words, std::index_sequence<I...>) {
  return function(argument<T>(words, I)...);
}

template <class... T>
int apply(int (*function)(T...), const char* words) {
  return apply(function, words, std::index_sequence_for<T...>());
}

int call(const char* name, const char* words) {
  if (!strcmp(name, "gemmakit_use_instruction_set")) return apply(gemmakit_use_instruction_set, words);
#define CALL(known, parameters, arguments) \
  if (!strcmp(name, #known)) return apply(known, words);
  GEMMAKIT_FUNCTIONS(CALL)
  _exit(3);
}

void answer() {
  char name[32];
  get(name, sizeof name);
  uint32_t count = get<uint32_t>(), pointers = get<uint32_t>();
  if (count > MOST) _exit(4);
  Segment segments[MOST];
  for (uint32_t i = 0; i < count; i++) segments[i] = get_segment();
  for (uint32_t i = 0; i < pointers; i++) {
    uint64_t in = get<uint64_t>(), at = get<uint64_t>(), to = get<uint64_t>();
    memcpy(segments[in].bytes + at, &segments[to].bytes, 8);
  }
  int32_t result = call(name, segments[0].bytes);
  fwrite(&result, 4, 1, stdout);
  for (uint32_t i = 1; i < count; i++) fwrite(segments[i].bytes, 1, segments[i].size, stdout);
  fflush(stdout);
  for (uint32_t i = 0; i < count; i++) munmap(segments[i].room, segments[i].whole);
}

}  // namespace

int main() {
  const char* isa = gemmakit_instruction_set();
  printf("%s\n", isa ? isa : "");
  fflush(stdout);
  for (;;) answer();
}
