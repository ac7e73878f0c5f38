// A library to preload: programs see the CPU without the features that CLAQ_HIDDEN_FEATURES names. Linux on x86-64. hide_cpu_features.py
// builds and uses it.
//
// The kernel is asked to let `cpuid` fault (arch_prctl(2), ARCH_SET_CPUID); the handler executes it and clears bits of what it says. Threads
// and forked children inherit that, programs started by exec do not, but they preload this library again. Where a processor cannot let it
// fault (`cpuid_fault` in /proc/cpuinfo), hide_cpu_features.py has put `invd` in its place in copies of the libraries that matter, which is as
// long and faults in every program: CLAQ_CPUID_REPLACED is 1 then.

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kEax, kEbx, kEcx, kEdx };

// Intel's Software Developer's Manual, volume 2A, CPUID: what a name stands for, as a bit of a register for a leaf and subleaf.
struct Feature {
  const char* name;
  uint32_t leaf, subleaf;
  int reg, bit;
};
static const struct Feature kFeatures[] = {
    {"avx512", 7, 0, kEbx, 16},     {"avx512", 7, 0, kEbx, 17}, {"avx512", 7, 0, kEbx, 21}, {"avx512", 7, 0, kEbx, 26},
    {"avx512", 7, 0, kEbx, 27},     {"avx512", 7, 0, kEbx, 28}, {"avx512", 7, 0, kEbx, 30}, {"avx512", 7, 0, kEbx, 31},
    {"avx512", 7, 0, kEcx, 1},      {"avx512", 7, 0, kEcx, 6},  {"avx512", 7, 0, kEcx, 11}, {"avx512", 7, 0, kEcx, 12},
    {"avx512", 7, 0, kEcx, 14},     {"avx512", 7, 0, kEdx, 2},  {"avx512", 7, 0, kEdx, 3},  {"avx512", 7, 0, kEdx, 8},
    {"avx512", 7, 0, kEdx, 23},     {"avx512", 7, 1, kEax, 5},  {"avx512", 7, 1, kEdx, 19},  // AVX10 as well
    {"avx512vbmi", 7, 0, kEcx, 1},  {"avx512vbmi", 7, 0, kEcx, 6},
    {"amx", 7, 0, kEdx, 22},        {"amx", 7, 0, kEdx, 24},    {"amx", 7, 0, kEdx, 25},    {"amx", 7, 1, kEax, 21},
    {"avxvnni", 7, 1, kEax, 4},     {"avxvnni", 7, 1, kEdx, 4}, {"avxvnni", 7, 1, kEdx, 10},
};
enum { kCount = sizeof kFeatures / sizeof *kFeatures };

static int hidden[kCount];
static int faults;  // cpuid itself does

static long let_cpuid_pass(long pass) {
  enum { kArchSetCpuid = 0x1012 };
  long status;
  __asm__ volatile("syscall" : "=a"(status) : "a"((long)SYS_arch_prctl), "D"((long)kArchSetCpuid), "S"(pass) : "rcx", "r11", "memory");
  return status;
}

static void at_fault(int signal_number, siginfo_t* info, void* context) {
  greg_t* regs = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* instruction = (const uint8_t*)regs[REG_RIP];
  const int is_cpuid = instruction[0] == 0x0f && instruction[1] == 0xa2, is_invd = instruction[0] == 0x0f && instruction[1] == 0x08;
  if (info->si_code != SI_KERNEL || !(is_cpuid || is_invd)) {
    signal(signal_number, SIG_DFL);  // somebody's fault: it happens again, and ends the program as usual
    return;
  }
  const uint32_t leaf = (uint32_t)regs[REG_RAX], subleaf = (uint32_t)regs[REG_RCX];
  uint32_t answer[4];
  if (faults) let_cpuid_pass(1);
  __asm__ volatile("cpuid" : "=a"(answer[kEax]), "=b"(answer[kEbx]), "=c"(answer[kEcx]), "=d"(answer[kEdx]) : "a"(leaf), "c"(subleaf));
  if (faults) let_cpuid_pass(0);
  for (int i = 0; i < kCount; ++i) {
    const struct Feature* feature = &kFeatures[i];
    if (hidden[i] && feature->leaf == leaf && feature->subleaf == subleaf) answer[feature->reg] &= ~(UINT32_C(1) << feature->bit);
  }
  regs[REG_RAX] = answer[kEax];
  regs[REG_RBX] = answer[kEbx];
  regs[REG_RCX] = answer[kEcx];
  regs[REG_RDX] = answer[kEdx];
  regs[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  char names[256];
  const char* wanted = getenv("CLAQ_HIDDEN_FEATURES");
  snprintf(names, sizeof names, "%s", wanted ? wanted : "");
  for (char* name = strtok(names, ","); name; name = strtok(NULL, ",")) {
    int known = 0;
    for (int i = 0; i < kCount; ++i) {
      if (strcmp(kFeatures[i].name, name) == 0) hidden[i] = known = 1;
    }
    if (!known) {
      fprintf(stderr, "CLAQ_HIDDEN_FEATURES: %s is unknown, expected avx512, avx512vbmi, amx or avxvnni\n", name);
      exit(2);
    }
  }
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = at_fault;
  action.sa_flags = SA_SIGINFO;
  const char* replaced = getenv("CLAQ_CPUID_REPLACED");
  const int ready = sigaction(SIGSEGV, &action, NULL) == 0;
  faults = let_cpuid_pass(0) == 0;
  if (!ready || !(faults || (replaced && strcmp(replaced, "1") == 0))) {
    fprintf(stderr, "CLAQ_HIDDEN_FEATURES: this processor or kernel does not let cpuid fault\n");
    exit(2);
  }
}
