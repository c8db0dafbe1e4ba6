// Which of the compiled instruction sets this processor runs, decided once when the library is loaded.

#include <cstdint>

#define FOR_EACH_ISA(DO) GEMMAKIT_ISAS(DO)

using LinearRows = int (*)(int, const uint16_t*, const uint16_t*, float*, const uint16_t*, uint16_t*, int, int64_t,
                           int64_t, int);

#define DECLARE(isa)                                                                                            \
  extern "C" int linear_rows_##isa(int, const uint16_t*, const uint16_t*, float*, const uint16_t*, uint16_t*, int, \
                                   int64_t, int64_t, int);
FOR_EACH_ISA(DECLARE)

namespace {

#if defined(__x86_64__)
bool runs_avx512bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
}
bool runs_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("f16c"); }
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#else
bool runs_neon() { return true; }
#endif

struct Choice {
  const char* name;
  LinearRows linear_rows;
};

Choice choose() {
#define TRY(isa) \
  if (runs_##isa()) return {#isa, linear_rows_##isa};
  FOR_EACH_ISA(TRY)
  return {nullptr, nullptr};
}

const Choice chosen = choose();

}  // namespace

extern "C" {

// The instruction set in use, or null when this processor has none of those compiled.
const char* gemmakit_isa() { return chosen.name; }

// format: 0 bfloat16, 1 float16. w (out, in), x (m, in), bias (out) or null, y (m, out), wide_x room for m * in floats.
// Gives 0, or 1 when m is not in 1..8.
int gemmakit_linear_rows(int format, const uint16_t* w, const uint16_t* x, float* wide_x, const uint16_t* bias,
                         uint16_t* y, int m, int64_t out, int64_t in, int threads) {
  return chosen.linear_rows(format, w, x, wide_x, bias, y, m, out, in, threads);
}
}
