/* Which features this CPU has, by the names that the targets use. */
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>
#include <unistd.h>

#include "edge_program.h"

int cpu_count(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
  long online = sysconf(_SC_NPROCESSORS_ONLN);
  return online > 0 ? (int)online : 1;
}

#if defined(__x86_64__)
#include <cpuid.h>

enum { A, B, C, D };

/* Where cpuid tells it, and the bits of XCR0 by which the system says that it saves the registers:
 * 6 for AVX, 0xe6 for AVX512. Intel's manual, volume 2, CPUID; AMD64's, volume 3, appendix E. */
static const struct {
  const char *name;
  unsigned leaf, subleaf, part, bit, saved;
} known[] = {
    {"sse4.2", 1, 0, C, 20, 0},           {"popcnt", 1, 0, C, 23, 0},
    {"movbe", 1, 0, C, 22, 0},            {"lzcnt", 0x80000001, 0, C, 5, 0},
    {"bmi", 7, 0, B, 3, 0},               {"bmi2", 7, 0, B, 8, 0},
    {"avx", 1, 0, C, 28, 6},              {"f16c", 1, 0, C, 29, 6},
    {"fma", 1, 0, C, 12, 6},              {"avx2", 7, 0, B, 5, 6},
    {"avx512f", 7, 0, B, 16, 0xe6},       {"avx512dq", 7, 0, B, 17, 0xe6},
    {"avx512cd", 7, 0, B, 28, 0xe6},      {"avx512bw", 7, 0, B, 30, 0xe6},
    {"avx512vl", 7, 0, B, 31, 0xe6},      {"avx512vnni", 7, 0, C, 11, 0xe6},
    {"avx512bf16", 7, 1, A, 5, 0xe6},
};

static unsigned saved_registers(void) {
  unsigned r[4] = {0}, high;
  if (!__get_cpuid(1, &r[A], &r[B], &r[C], &r[D]) || !(r[C] >> 27 & 1)) return 0;
  __asm__ volatile("xgetbv" : "=a"(r[A]), "=d"(high) : "c"(0));
  return r[A];
}

static int has(const char *name) {
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    unsigned r[4] = {0};
    if (strcmp(known[i].name, name)) continue;
    return __get_cpuid_count(known[i].leaf, known[i].subleaf, &r[A], &r[B], &r[C], &r[D]) &&
           r[known[i].part] >> known[i].bit & 1 &&
           (saved_registers() & known[i].saved) == known[i].saved;
  }
  return 0;
}

#elif defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>

/* Linux, arch/arm64/include/uapi/asm/hwcap.h and arch/arm/include/uapi/asm/hwcap.h. */
static const struct {
  const char *name;
  unsigned long type, bit;
} known[] = {
#if defined(__aarch64__)
    {"neon", 16, 1}, {"dotprod", 16, 20}, {"i8mm", 26, 13}, {"bf16", 26, 14},
#else
    {"neon", 16, 12}, {"vfp4", 16, 16},
#endif
};

static int has(const char *name) {
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(known[i].name, name)) return getauxval(known[i].type) >> known[i].bit & 1;
  return 0;
}

#else
static int has(const char *name) {
  (void)name; /* RV64GC and others whose code needs nothing beyond what every such CPU has */
  return 0;
}
#endif

int cpu_lacks(const char *features, char *name, size_t size) {
  while (*features) {
    size_t length = strcspn(features, " ");
    if (length > 0 && length < size) {
      memcpy(name, features, length);
      name[length] = 0;
      if (!has(name)) return 1;
    }
    features += length + (features[length] == ' ');
  }
  return 0;
}
