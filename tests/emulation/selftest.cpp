// Drives the kernels of selftest.cu: selftest <what> [argument]. Prints what test_emulation.py
// looks at.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "standalone.h"

extern "C" void pydl_emulation_seed(uint64_t seed);

namespace {

using pydl::arg;
using pydl::call;
using pydl::View;

constexpr int kSeeds = 20;

// Exactly as large as it says, for the address sanitizer.
template <class T>
struct Array {
  std::vector<int64_t> sizes;
  int64_t numel = 1;
  std::unique_ptr<T[]> data;

  explicit Array(std::vector<int64_t> shape, T value = T()) : sizes(std::move(shape)) {
    for (int64_t n : sizes) numel *= n;
    data.reset(new T[static_cast<size_t>(numel)]);
    for (int64_t i = 0; i < numel; ++i) data[i] = value;
  }
  T& operator[](int64_t i) { return data[i]; }
  operator pydl::Arg() const {
    View view;
    view.data = data.get();
    view.ndim = static_cast<int32_t>(sizes.size());
    view.numel = numel;
    view.sizes = sizes.data();
    return arg(view);
  }
};

pydl::Arg number(int64_t value) { return arg(value); }

void expect(bool right, const char* what, int64_t at, double got, double wanted) {
  if (!right) {
    printf("%s: element %ld is %.17g, not %.17g\n", what, static_cast<long>(at), got, wanted);
    exit(1);
  }
}

// Small integers, so that every order of summation gives the same float.
Array<float> inputs(int64_t blocks, int64_t threads) {
  Array<float> x({blocks, threads});
  for (int64_t i = 0; i < x.numel; ++i) x[i] = static_cast<float>(i * 7919 % 19 - 9);
  return x;
}

// The elements of y that are not the sums of the rows of x, plus those of their squares if twice.
int64_t wrong_sums(Array<float>& y, Array<float>& x, bool twice) {
  int64_t wrong = 0;
  const int64_t threads = x.sizes[1];
  for (int64_t b = 0; b < x.sizes[0]; ++b) {
    float sum = 0;
    for (int64_t t = 0; t < threads; ++t) {
      const float v = x[b * threads + t];
      sum += v + (twice ? v * v : 0);
    }
    for (int64_t t = 0; t < threads; ++t) wrong += !(y[b * threads + t] == sum);
  }
  return wrong;
}

int64_t wrong_reversals(Array<float>& y, Array<float>& x, bool warp) {
  int64_t wrong = 0;
  const int64_t threads = x.sizes[1];
  for (int64_t i = 0; i < x.numel; ++i) {
    const int64_t row = i / threads * threads, t = i % threads;
    wrong += !(y[i] == x[row + (warp ? t ^ 31 : threads - 1 - t)]);
  }
  return wrong;
}

void check_sum(int64_t threads) {
  Array<float> x = inputs(9, threads), y({9, threads});
  call("selftest_sum", {y, x, number(0)});
  const double wrong = static_cast<double>(wrong_sums(y, x, true));
  expect(wrong == 0, "number of wrong sums", threads, wrong, 0);
}

void check_sums() {
  for (int64_t threads : {32, 64, 256, 992, 1024}) {
    check_sum(threads);
    Array<float> x = inputs(9, threads), y({9, threads});
    for (bool warp : {false, true}) {
      call("selftest_reverse", {y, x, number(warp), number(true)});
      const double wrong = static_cast<double>(wrong_reversals(y, x, warp));
      expect(wrong == 0, "number of wrong reversals", threads, wrong, 0);
    }
  }
}

// In clusters of `cluster` blocks; how many numbers are not those of two blocks on.
int wrong_rotations(int64_t cluster, int missing) {
  constexpr int64_t kBlocks = 24, kThreads = 96;
  Array<double> x({kBlocks, kThreads}), y({kBlocks, kThreads});
  for (int64_t i = 0; i < x.numel; ++i) x[i] = static_cast<double>(i);
  call("selftest_rotate", {y, x, number(cluster), number(missing)});
  int wrong = 0;
  for (int64_t i = 0; i < x.numel; ++i) {
    const int64_t block = i / kThreads, first = block / cluster * cluster;
    const int64_t from = first + (block - first + 2) % cluster, t = (i % kThreads + 2) % kThreads;
    wrong += y[i] != x[from * kThreads + t];
  }
  return wrong;
}

void check_clusters() {
  for (int64_t cluster : {1, 2, 3, 8}) {
    const int wrong = wrong_rotations(cluster, 0);
    expect(wrong == 0, "number of wrong rotations", cluster, wrong, 0);
  }
}

void check_shuffles() {
  Array<int> y({4, 5, 40, 32});
  call("selftest_shuffles", {y});
  for (int64_t i = 0; i < y.numel; ++i) {
    const int lane = i % 32, n = i / 32 % 40, width = 32 >> (i / (32 * 40) % 5);
    const int first = lane - lane % width, last = first + width - 1, operand = n % 32;
    int from = lane;
    switch (i / (32 * 40 * 5)) {
      case 0:
        from = first + n % width;
        break;
      case 1:
        from = lane - operand;
        break;
      case 2:
        from = lane + operand;
        break;
      case 3:
        from = lane ^ operand;
        break;
    }
    const bool butterfly = i / (32 * 40 * 5) == 3;
    if (from > last || (from < first && !butterfly)) from = lane;
    expect(y[i] == 100 + from, "shuffles", i, y[i], 100 + from);
  }
}

void check_warps() {
  Array<double> y({64, 8});
  call("selftest_warps", {y});
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32;
    double sum = lane < 16 ? 120 : 376;
    for (int i = 0; i < 3 && lane < 16; ++i) sum += 5;
    const double wanted[8] = {
        0.1 * (lane ^ 1),
        1099511627776.0 + (lane ^ 1),
        lane == 31   ? 15.0
        : lane == 15 ? 0.0
                     : 0xfffffff0u + (lane + 1.0),
        sum,
        double{0x49249249u},
        (t >= 32 ? 4.0 : 0.0) + (t < 32 ? 2.0 : 0.0) + (lane < 16 ? 1.0 : 0.0),
        t < 48 ? 24.0 : -1.0,
        t < 48 ? 10.0 : -1.0};
    for (int i = 0; i < 8; ++i) {
      double want = wanted[i];
      if (i == 2) want = static_cast<unsigned>(0xfffffff0u + (lane == 31 ? 31u : lane + 1u));
      expect(y[8 * t + i] == want, "warps", 8 * t + i, y[8 * t + i], want);
    }
  }
}

void check_integers() {
  const int64_t some[] = {0,         1,        -1, 5, 0x7fffffff, 0x80000000, 0x123456789abcdef0,
                          INT64_MIN, INT64_MAX};
  const int64_t n = sizeof some / sizeof some[0];
  Array<int64_t> y({n * n, 16}), a({n * n}), b({n * n});
  for (int64_t i = 0; i < n * n; ++i) {
    a[i] = some[i / n];
    b[i] = some[i % n];
  }
  call("selftest_integers", {y, a, b});
  for (int64_t i = 0; i < n * n; ++i) {
    const int u = static_cast<int>(a[i]), v = static_cast<int>(b[i]);
    int64_t ones[2] = {0, 0}, first[2] = {0, 0}, leading[2] = {32, 64}, reversed = 0;
    for (int bit = 0; bit < 64; ++bit) {
      const bool set = static_cast<uint64_t>(a[i]) >> bit & 1u;
      for (int wide = bit < 32 ? 0 : 1; wide < 2; ++wide) {
        ones[wide] += set;
        if (set && first[wide] == 0) first[wide] = bit + 1;
        if (set) leading[wide] = (wide ? 63 : 31) - bit;
      }
      if (bit < 32 && set) reversed |= int64_t{1} << (31 - bit);
    }
    const uint64_t low = static_cast<uint32_t>(u), other = static_cast<uint32_t>(v);
    const int64_t wanted[16] = {
        ones[0],
        ones[1],
        first[0],
        first[1],
        leading[0],
        leading[1],
        reversed,
        static_cast<int64_t>(std::floor(std::ldexp(static_cast<long double>(u) * v, -32))),
        static_cast<int64_t>(low * other >> 32),
        static_cast<int64_t>(static_cast<__int128>(a[i]) * b[i] >> 64),
        static_cast<int64_t>(static_cast<unsigned __int128>(static_cast<uint64_t>(a[i])) *
                                 static_cast<uint64_t>(b[i]) >>
                             64),
        u < v ? u : v,
        u < v ? v : u,
        u & 0x3fffffff,
        2 - 20,
        100 * n * n};
    for (int64_t k = 0; k < 16; ++k) {
      const double got = static_cast<double>(y[16 * i + k]), want = static_cast<double>(wanted[k]);
      expect(y[16 * i + k] == wanted[k], "integers", 16 * i + k, got, want);
    }
  }
}

void check() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    pydl_emulation_seed(static_cast<uint64_t>(seed));
    check_sums();
    check_clusters();
    check_shuffles();
    check_warps();
    check_integers();
  }
  puts("all right");
}

// With how many of the seeds each missing barrier changes a result.
void missing() {
  int sum[3] = {}, reverse[2][2] = {};
  for (int seed = 0; seed < kSeeds; ++seed) {
    pydl_emulation_seed(static_cast<uint64_t>(seed));
    Array<float> x = inputs(4, 128), y({4, 128});
    for (int which = 0; which < 3; ++which) {
      call("selftest_sum", {y, x, number(which)});
      sum[which] += wrong_sums(y, x, which != 1) != 0;
    }
    for (int warp = 0; warp < 2; ++warp) {
      for (int barrier = 0; barrier < 2; ++barrier) {
        call("selftest_reverse", {y, x, number(warp), number(barrier)});
        reverse[warp][barrier] += wrong_reversals(y, x, warp) != 0;
      }
    }
  }
  printf("sum %d %d %d\n", sum[0], sum[1], sum[2]);
  printf("reverse %d %d\nwarp %d %d\n", reverse[0][1], reverse[0][0], reverse[1][1], reverse[1][0]);
}

std::string failure(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no failure";
}

std::string wrong(int kind) {
  Array<float> y({128});
  Array<int> alive({1});
  const std::string message = failure([&] { call("selftest_wrong", {y, alive, number(kind)}); });
  expect(alive[0] == 0, "threads alive after failure", kind, alive[0], 0);
  return message;
}

// Each failure, and that the next launch knows nothing of it.
void all_wrong() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    pydl_emulation_seed(static_cast<uint64_t>(seed));
    for (int kind = 0; kind < 7; ++kind) {
      const std::string message = wrong(kind);
      printf("%d: %s\n", kind, message.c_str());
      check_sum(64);
    }
  }
}

void limits() {
  const int64_t many = int64_t{1} << 31;
  const int64_t configurations[][5] = {{0, 1, 1, 32, 0},
                                       {1, 0, 1, 32, 0},
                                       {1, 1, 1, 0, 0},
                                       {1, 1, 1, 1025, 0},
                                       {many, 1, 1, 32, 0},
                                       {1, 65536, 1, 32, 0},
                                       {1, 1, 65536, 32, 0},
                                       {1, 1, 1, 32, 227 * 1024 + 1},
                                       {2, 3, 4, 1024, 227 * 1024}};
  for (const auto& c : configurations) {
    const auto launch = [&] {
      call("selftest_nothing",
           {number(c[0]), number(c[1]), number(c[2]), number(c[3]), number(c[4])});
    };
    puts(failure(launch).c_str());
  }
}

// Clusters that miss a barrier, that CUDA does not take, and that share what is each block's own.
void clusters() {
  int missed = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    pydl_emulation_seed(static_cast<uint64_t>(seed));
    missed += wrong_rotations(4, 1) != 0;
  }
  printf("%d\n", missed);
  for (int64_t cluster : {5, 12}) {
    puts(failure([&] { wrong_rotations(cluster, 0); }).c_str());
  }
  puts(failure([&] { wrong_rotations(2, 2); }).c_str());
}

void order(int seed) {
  pydl_emulation_seed(static_cast<uint64_t>(seed));
  for (int launch = 0; launch < 2; ++launch) {
    Array<int> y({24 * 64, 2}), count({1});
    call("selftest_order", {y, count, number(4), number(3), number(2), number(64)});
    for (int64_t i = 0; i < 24 * 64; ++i) printf("%d %d ", y[2 * i], y[2 * i + 1]);
    puts("");
  }
}

void unwritten() {
  Array<float> y({3, 64});
  call("selftest_unwritten", {y});
  for (int64_t i = 0; i < y.numel; ++i) printf("%g ", static_cast<double>(y[i]));
  puts("");
}

void past(int where) {
  Array<float> y({64});
  puts(failure([&] { call("selftest_past", {y, number(where)}); }).c_str());
}

void threads() {
  std::vector<std::thread> all;
  for (int i = 0; i < 4; ++i) {
    all.emplace_back([] {
      for (int round = 0; round < 20; ++round) {
        check_sum(96);
        wrong(0);
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  puts("all right");
}

void speed() {
  const auto seconds = [](const std::function<void()>& body) {
    double best = 1e9;
    for (int i = 0; i < 5; ++i) {
      const auto start = std::chrono::steady_clock::now();
      body();
      best = std::min(
          best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
  };
  Array<float> x = inputs(64, 256), y({64, 256});
  const double barriers = seconds([&] { call("selftest_barriers", {y, number(20)}); });
  const double sums = seconds([&] { call("selftest_sum", {y, x, number(0)}); });
  Array<float> a({1 << 20}), b({1 << 20});
  const double add = seconds([&] { call("selftest_add", {a, b}); });
  const double loop = seconds([&] {
    for (int64_t i = 0; i < a.numel; ++i) a[i] += b[i];
  });
  printf("64 blocks of 256 threads: 20 barriers %.1f ms, two block sums %.1f ms\n", 1e3 * barriers,
         1e3 * sums);
  printf("2^20 floats added by float4: %.2f ms, by a loop %.2f ms\n", 1e3 * add, 1e3 * loop);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  const int argument = count > 2 ? atoi(arguments[2]) : 0;
  const std::map<std::string, std::function<void()>> all = {
      {"check", check},         {"missing", missing},
      {"wrong", all_wrong},     {"limits", limits},
      {"clusters", clusters},   {"order", [&] { order(argument); }},
      {"unwritten", unwritten}, {"past", [&] { past(argument); }},
      {"threads", threads},     {"speed", speed},
  };
  if (all.count(what) == 0) return 2;
  all.at(what)();
}
