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

struct pool {
  int threads, spins;
  struct worker *workers;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  task run; /* the loop being computed; written before `epoch` is raised */
  void *data;
  int count, active;
  atomic_int stop, failed, sleepers;
  _Alignas(64) atomic_uint epoch;
  _Alignas(64) atomic_int pending;
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

static void run_tasks(struct worker *me) {
  struct pool *pool = me->pool;
  group env = {pool, pool->count};
  for (int i = me->index; i < pool->count; i += pool->threads)
    if (pool->run(i, &env, pool->data)) atomic_store(&pool->failed, 1);
}

static void *work(void *given) {
  struct worker *me = given;
  struct pool *pool = me->pool;
  unsigned seen = 0;
  here = me;
  for (;;) {
    for (int i = 0; i < pool->spins && atomic_load(&pool->epoch) == seen; i++) pause_briefly();
    if (atomic_load(&pool->epoch) == seen) {
      pthread_mutex_lock(&pool->lock);
      atomic_fetch_add(&pool->sleepers, 1);
      while (atomic_load(&pool->epoch) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
      atomic_fetch_sub(&pool->sleepers, 1);
      pthread_mutex_unlock(&pool->lock);
    }
    seen++; /* the caller waits for all before it raises the epoch again */
    if (atomic_load(&pool->stop)) return NULL;
    run_tasks(me);
    atomic_fetch_sub(&pool->pending, 1);
  }
}

static void announce(struct pool *pool) {
  atomic_fetch_add(&pool->epoch, 1);
  if (atomic_load(&pool->sleepers)) {
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
  }
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
  atomic_store(&pool->stop, 1);
  announce(pool);
  for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i].thread, NULL);
  for (int i = 0; i < pool->threads; i++)
    for (int j = 0; j < BLOCKS; j++) free(pool->workers[i].blocks[j].data);
  pthread_cond_destroy(&pool->wake);
  pthread_mutex_destroy(&pool->lock);
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
  pool->active = 1;
  pool->run = run;
  pool->data = data;
  pool->count = count > 0 ? count : pool->threads;
  atomic_store(&pool->failed, 0);
  atomic_store(&pool->pending, pool->threads - 1);
  announce(pool);
  run_tasks(me);
  for (int i = 0; atomic_load(&pool->pending); i++) {
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
