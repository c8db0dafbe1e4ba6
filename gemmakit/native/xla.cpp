// gemmakit_project as XLA calls it: the products of the Flax backend on a CPU, by the weights as they are stored.
//
// The structures are those of XLA's binary interface for foreign functions (xla/ffi/api/c_api.h), as far as a product
// reads them: they have been the same in every jaxlib from 0.4.38 on, and within a major version new fields only come
// behind the old ones. Each begins with its size, by which more than these is never read.

#include <mutex>

#include "native.h"

#if defined(_OPENMP)
extern "C" int omp_get_max_threads(void);  // Apple's compiler knows OpenMP but has no header of it
#endif

extern "C" int gemmakit_project(const Matrix* m, int count, int x_format, const void* x, int rows, void* const* y,
                                const void* residual, int threads);

namespace {

struct Begin {
  size_t size;
  void* extension;
};

struct Version {
  Begin begin;
  int major, minor;
};

struct Failed;  // an error, which XLA frees

struct Failure {
  Begin begin;
  const char* message;
  int code;
};

struct Api {
  Begin begin;
  Version version;
  const void* internal;
  Failed* (*fail)(Failure*);
};

struct Array {
  Begin begin;
  int32_t type;
  void* data;
  int64_t rank;
  const int64_t* sizes;
};

struct Arrays {
  Begin begin;
  int64_t count;
  const int32_t* kinds;  // 1: an Array
  const Array* const* all;
};

struct Call {
  Begin begin;
  const Api* api;
  void* context;
  int32_t stage;
  Arrays given, made;
};

// With which XLA asks a function, instead of calling it, for which version it was written.
struct Question {
  size_t size;
  int32_t kind;
  void* next;
  struct {
    size_t size;
    Version version;
  } * answer;
};
constexpr int32_t ABOUT = 1;
constexpr int MAJOR = 0, MINOR = 1, INVALID_ARGUMENT = 3;

int format_of(int32_t type) {
  switch (type) {
    case 10: return F16;
    case 11: return F32;
    case 16: return BF16;
  }
  return -1;
}

const char* multiply(const Call& call, bool turned) {
  if (call.given.count != 2 || call.made.count != 1) return "a product takes x and a weight, and gives one array";
  const Array &x = *call.given.all[0], &w = *call.given.all[1], &y = *call.made.all[0];
  int x_format = format_of(x.type), w_format = format_of(w.type);
  if (x_format < 0 || w_format < 0 || y.type != x.type) return "a product takes float32, bfloat16 and float16";
  if (x.rank < 1 || w.rank != 2 || y.rank != x.rank) return "a product takes x (..., in) and a weight of two axes";
  int64_t in = w.sizes[!turned], out = w.sizes[turned], rows = 1;
  for (int64_t i = 0; i + 1 < x.rank; i++) rows *= x.sizes[i];
  if (x.sizes[x.rank - 1] != in || y.sizes[x.rank - 1] != out) return "x and the weight do not fit each other";
  if (!rows || !out) return nullptr;
  Matrix matrix = {w_format, 0, 0, 0, out, in, w.data, nullptr, nullptr, nullptr, turned};
  // XLA may start products that do not wait for each other at the same time; one has all threads sooner done.
  static std::mutex one_by_one;
  std::lock_guard<std::mutex> turn(one_by_one);
#if defined(_OPENMP)
  int threads = omp_get_max_threads();
#else
  int threads = 1;
#endif
  for (int64_t done = 0, some; done < rows; done += some) {
    some = rows - done < 1 << 20 ? rows - done : 1 << 20;
    int size = x_format == F32 ? 4 : 2;
    const void* own = (const char*)x.data + done * in * size;
    void* to = (char*)y.data + done * out * size;
    if (gemmakit_project(&matrix, 1, x_format, own, (int)some, &to, nullptr, threads)) return "an empty product";
  }
  return nullptr;
}

Failed* answer(const Call* call, bool turned) {
  if (auto* asked = (Question*)call->begin.extension; asked && asked->kind == ABOUT) {
    asked->answer->version.major = MAJOR;
    asked->answer->version.minor = MINOR;
    return nullptr;
  }
  const char* wrong = multiply(*call, turned);
  if (!wrong) return nullptr;
  Failure failure = {{sizeof(Failure), nullptr}, wrong, INVALID_ARGUMENT};
  return call->api->fail(&failure);
}

}  // namespace

extern "C" {

// y (..., out) = x (..., in) by a weight (in, out), or (out, in): XLA_FFI_Handler.
void* gemmakit_xla_multiply(const void* call) { return answer((const Call*)call, true); }
void* gemmakit_xla_multiply_rows(const void* call) { return answer((const Call*)call, false); }
}
