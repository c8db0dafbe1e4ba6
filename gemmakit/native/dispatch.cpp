// Which of the compiled instruction sets is used: the best that this processor runs, decided when the library is
// loaded; GEMMAKIT_ISA or gemmakit_use_instruction_set asks for another.

#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#if defined(__aarch64__)
#include <sys/auxv.h>
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "native.h"

// GEMMAKIT_ISAS(DO) is DO(name) for each instruction set that was compiled, best first.
#define DECLARE_TABLE(isa) extern "C" const Kernels kernels_##isa;
GEMMAKIT_ISAS(DECLARE_TABLE)

namespace {

#if defined(__x86_64__)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool runs_avxvnni() { return runs_avx2() && __builtin_cpu_supports("avxvnni"); }
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool runs_avx512vnni() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool runs_avx512bf16() { return runs_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#if !defined(HAS_TILES) && defined(__linux__)
// By the processor's own word: not every compiler that knows the others knows these. A process has no room for tiles before
// it has asked for it: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
bool has_tiles() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
         !syscall(SYS_arch_prctl, 0x1023, 18);
}
#define HAS_TILES has_tiles()
#elif !defined(HAS_TILES)
#define HAS_TILES false
#endif
bool runs_amx() { return runs_avx512bf16() && HAS_TILES; }
#else
bool runs_neon() { return true; }
#if defined(__linux__)
bool runs_neondot() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#else
bool runs_neondot() { return true; }  // every aarch64 processor of Apple's computers
#endif
#endif

// Whether a set is the one asked for, or where none is, one that pays. On Intel's processors products of pairs of bfloat16
// reach 0.6 of what float32 does: those without tiles multiply in float32.
bool is_wanted(const char* isa, const char* name) {
  if (name) return !std::strcmp(name, isa);
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512bf16")) return !__builtin_cpu_is("intel");
#endif
  return true;
}

const Kernels* find(const char* name) {
#define TRY(isa) \
  if (is_wanted(#isa, name) && runs_##isa()) return &kernels_##isa;
  GEMMAKIT_ISAS(TRY)
  return nullptr;
}

const Kernels* first() {
  const char* wanted = std::getenv("GEMMAKIT_ISA");
  return find(wanted && *wanted ? wanted : nullptr);
}

const Kernels* chosen = first();

}  // namespace

#if defined(__APPLE__)
// Compilers of 2025 call this after every loop whose turns they hand out. Older OpenMP libraries, torch's among them,
// do not have it, and need nothing done.
extern "C" __attribute__((visibility("hidden"))) void __kmpc_dispatch_deinit(void*, int32_t) {}
#endif

extern "C" {

// The digest of what the library was made from, by sources.py.
const char* gemmakit_sources() { return GEMMAKIT_SOURCES; }

// How it was made, by hatch_build.py, which looks for it in the file and asks for nothing.
const char* gemmakit_recipe() { return GEMMAKIT_RECIPE; }

// The instruction set in use, or null when this processor has none of those compiled (or not the one asked for).
const char* gemmakit_instruction_set() { return chosen ? chosen->isa : nullptr; }

// Use another from now on, or the best where name is null: 0, or 1 when it was not compiled or does not run here.
// Not while kernels run.
int gemmakit_use_instruction_set(const char* name) {
  const Kernels* found = find(name);
  if (found) chosen = found;
  return !found;
}

#define EXPORT(name, parameters, arguments) \
  int name parameters { return chosen->name arguments; }
GEMMAKIT_FUNCTIONS(EXPORT)
}
