/* The threads of one model, behind the hooks by which generated code asks for parallel loops and
 * scratch memory (tvm/runtime/c_backend_api.h and tvm/ffi/c_api.h).
 *
 * A parallel loop is cut into as many tasks as there are threads; which iterations a task gets
 * depends on that number, what an iteration computes does not. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edge_program.h"

/* How long a thread looks for work before it sleeps: some 50 µs, longer than the pauses between the
 * parallel loops of one run. */
enum { SPINS = 4000, BLOCKS = 16 };

typedef struct {
  void *sync_handle;
  int32_t num_task;
} group;
typedef int (*task)(int index, group *env, void *data);

struct block {
  void *data;
  size_t size;
  int used;
};

struct worker {
  struct pool *pool;
  int index;
  pthread_t thread;
  struct block blocks[BLOCKS]; /* scratch memory, kept from run to run */
  char error[400];
};

/* A loop being computed, in one cache line. The ticket holds the number of the loop in its upper
 * half, then 16 bits each for its tasks and for the next task that nobody has taken. A thread that
 * advances the ticket owns that task; until it is done, the caller publishes no other loop, so what
 * the thread read beside the ticket belongs to it. */
struct loop {
  _Atomic uint64_t ticket;
  _Atomic(task) run;
  _Atomic(void *) data;
};

struct pool {
  int threads, spins, active;
  pid_t process; /* that created it: a forked child has none of its threads */
  struct worker *workers;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  atomic_int stop, failed, sleepers;
  _Alignas(64) struct loop loop;
  _Alignas(64) atomic_int done;
  _Alignas(64) atomic_int arrived;
  atomic_uint generation;
};

static _Thread_local struct worker *here; /* whose kernels this thread is running */
static _Thread_local char last_error[400];

static char *error_text(void) { return here && here->index ? here->error : last_error; }

static void say(const char *text) { snprintf(error_text(), sizeof last_error, "%s", text); }

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield");
#endif
}

static uint32_t number_of(uint64_t ticket) { return (uint32_t)(ticket >> 32); }

/* Takes and runs tasks of the loop with that number until none is left. Whoever is free takes the
 * next one: a thread that the system has put aside holds nobody up. */
static void run_tasks(struct pool *pool, uint32_t number) {
  uint64_t ticket = atomic_load(&pool->loop.ticket);
  for (;;) {
    int next = (int)(ticket & 0xffff), count = (int)(ticket >> 16 & 0xffff);
    task run = atomic_load_explicit(&pool->loop.run, memory_order_relaxed);
    void *data = atomic_load_explicit(&pool->loop.data, memory_order_relaxed);
    if (number_of(ticket) != number || next == count) return;
    if (!atomic_compare_exchange_weak(&pool->loop.ticket, &ticket, ticket + 1)) continue;
    group env = {pool, count};
    if (run(next, &env, data)) atomic_store(&pool->failed, 1);
    atomic_fetch_add(&pool->done, 1);
    ticket = atomic_load(&pool->loop.ticket);
  }
}

static void *work(void *given) {
  struct worker *me = given;
  struct pool *pool = me->pool;
  uint32_t seen = 0, number = 0;
  here = me;
  for (;;) {
    for (int i = 0; i < pool->spins; i++) {
      number = number_of(atomic_load_explicit(&pool->loop.ticket, memory_order_relaxed));
      if (number != seen) break;
      pause_briefly();
    }
    if (number == seen) {
      pthread_mutex_lock(&pool->lock);
      atomic_fetch_add(&pool->sleepers, 1);
      while ((number = number_of(atomic_load(&pool->loop.ticket))) == seen)
        pthread_cond_wait(&pool->wake, &pool->lock);
      atomic_fetch_sub(&pool->sleepers, 1);
      pthread_mutex_unlock(&pool->lock);
    }
    seen = number;
    if (atomic_load(&pool->stop)) return NULL;
    run_tasks(pool, number);
  }
}

/* Makes a loop known to all threads and gives its number. */
static uint32_t publish(struct pool *pool, task run, void *data, int count) {
  uint32_t number = number_of(atomic_load(&pool->loop.ticket)) + 1;
  atomic_store(&pool->done, 0);
  atomic_store_explicit(&pool->loop.run, run, memory_order_relaxed);
  atomic_store_explicit(&pool->loop.data, data, memory_order_relaxed);
  atomic_store(&pool->loop.ticket, (uint64_t)number << 32 | (uint64_t)count << 16);
  if (atomic_load(&pool->sleepers)) {
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
  }
  return number;
}

struct pool *pool_create(int threads) {
  struct pool *pool = NULL;
  if (posix_memalign((void **)&pool, 64, sizeof *pool)) return NULL;
  memset(pool, 0, sizeof *pool);
  pool->workers = calloc((size_t)threads, sizeof *pool->workers);
  if (!pool->workers) {
    free(pool);
    return NULL;
  }
  pthread_mutex_init(&pool->lock, NULL);
  pthread_cond_init(&pool->wake, NULL);
  pool->threads = 1;
  pool->process = getpid();
  pool->spins = threads <= cpu_count() ? SPINS : 0;
  pool->workers[0].pool = pool;
  for (int i = 1; i < threads; i++) {
    struct worker *worker = &pool->workers[i];
    worker->pool = pool;
    worker->index = i;
    /* `threads` counts the started ones alone, so that pool_destroy() joins no other. No loop is
     * announced before all have started. */
    if (pthread_create(&worker->thread, NULL, work, worker)) {
      pool_destroy(pool);
      return NULL;
    }
    pool->threads = i + 1;
  }
  return pool;
}

void pool_destroy(struct pool *pool) {
  if (!pool) return;
  /* In a forked child there are no threads to end, and what they wait on stays as it was. */
  if (pool->process == getpid()) {
    atomic_store(&pool->stop, 1);
    publish(pool, NULL, NULL, 0);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
  }
  for (int i = 0; i < pool->threads; i++)
    for (int j = 0; j < BLOCKS; j++) free(pool->workers[i].blocks[j].data);
  free(pool->workers);
  free(pool);
}

int pool_threads(const struct pool *pool) { return pool->threads; }

void pool_enter(struct pool *pool) {
  here = &pool->workers[0];
  last_error[0] = 0;
  for (int i = 0; i < pool->threads; i++) {
    pool->workers[i].error[0] = 0;
    /* A kernel that failed has not given its scratch memory back. */
    for (int j = 0; j < BLOCKS; j++) pool->workers[i].blocks[j].used = 0;
  }
}

void pool_leave(void) { here = NULL; }

const char *pool_error(void) { return last_error; }

/* Runs `run` as `count` tasks; as many as there are threads where `count` is 0. */
static int launch(task run, void *data, int count) {
  struct worker *me = here;
  struct pool *pool = me ? me->pool : NULL;
  if (!pool || pool->threads == 1 || pool->active || me->index) {
    /* One thread, or a loop inside a parallel loop: the tasks in turn. */
    group env = {NULL, count > 0 ? count : 1};
    for (int i = 0; i < env.num_task; i++)
      if (run(i, &env, data)) return -1;
    return 0;
  }
  if (!count) count = pool->threads;
  if (count < 1 || count > 0xffff) {
    say("a parallel loop of more than 65535 tasks");
    return -1;
  }
  pool->active = 1;
  atomic_store(&pool->failed, 0);
  run_tasks(pool, publish(pool, run, data, count));
  for (int i = 0; atomic_load(&pool->done) != count; i++) {
    if (i < pool->spins)
      pause_briefly();
    else
      sched_yield();
  }
  pool->active = 0;
  if (!atomic_load(&pool->failed)) return 0;
  for (int i = 1; i < pool->threads && !last_error[0]; i++) say(pool->workers[i].error);
  return -1;
}

/* Waits until all tasks of a loop are here. */
static int barrier(int index, group *env) {
  struct pool *pool = env->sync_handle;
  (void)index;
  if (env->num_task == 1) return 0;
  if (!pool || env->num_task > pool->threads) {
    say("a barrier among more tasks than threads");
    return -1;
  }
  unsigned generation = atomic_load(&pool->generation);
  if (atomic_fetch_add(&pool->arrived, 1) + 1 == env->num_task) {
    atomic_store(&pool->arrived, 0);
    atomic_fetch_add(&pool->generation, 1);
    return 0;
  }
  for (int i = 0; atomic_load(&pool->generation) == generation; i++) {
    if (i < pool->spins)
      pause_briefly();
    else
      sched_yield();
  }
  return 0;
}

static void *allocate(int device, int number, uint64_t size, int code, int bits) {
  struct block *fit = NULL, *spare = NULL;
  (void)device, (void)number, (void)code, (void)bits;
  for (int i = 0; here && i < BLOCKS; i++) {
    struct block *block = &here->blocks[i];
    if (block->used) continue;
    if (block->size >= size && (!fit || block->size < fit->size)) fit = block;
    if (!spare || block->size < spare->size) spare = block;
  }
  if (!fit && spare) {
    void *data = NULL;
    if (size < SIZE_MAX / 2 && !posix_memalign(&data, 64, size ? (size_t)size : 1)) {
      free(spare->data);
      *spare = (struct block){data, (size_t)size, 0};
      fit = spare;
    }
  }
  if (!fit) {
    say("no memory for a kernel's scratch space");
    return NULL;
  }
  fit->used = 1;
  return fit->data;
}

static int release(int device, int number, void *data) {
  (void)device, (void)number;
  for (int i = 0; here && i < BLOCKS; i++)
    if (here->blocks[i].data == data) here->blocks[i].used = 0;
  return 0;
}

/* The hooks. Generated code holds weak copies of the pointers; these take their place. */
int (*__TVMBackendParallelLaunch)(task, void *, int) = launch;
int (*__TVMBackendParallelBarrier)(int, group *) = barrier;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  char *text = error_text();
  size_t used = (size_t)snprintf(text, sizeof last_error, "%s: ", kind);
  for (int i = 0; i < count && used < sizeof last_error; i++)
    if (parts[i]) used += (size_t)snprintf(text + used, sizeof last_error - used, "%s", parts[i]);
  for (; *text; text++)
    if (*text == '\n') *text = ' '; /* messages are one line */
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}
