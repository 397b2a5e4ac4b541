/* Runs a SavedModel with the C API of TensorFlow, which is the runtime inside TensorFlow Serving.

   run_saved_model [--no-xla] EXPORT [LIBRARY...]

   Loads the libraries of custom ops, then the export (tag "serve"), and obeys standard input, whose
   lines hold words parted by single spaces:

     request INPUTS {TENSOR DTYPE RANK DIM... VALUE...} OUTPUTS {TENSOR...}
       keeps a request. TENSOR is "operation:index"; DTYPE is string, int32 or float32; a string is
       written in hexadecimal, the empty one as "-".
     run THREADS TIMES OPTIONS
       runs all requests kept since the last run, TIMES times over, from THREADS threads at once;
       OPTIONS is a RunOptions protocol buffer in hexadecimal, or "-".

   Standard output, one line each:

     loaded VERSION KIB                      of TensorFlow; resident memory of the process
     answer TASK ok {DTYPE RANK DIM... VALUE...}
     answer TASK error CODE MESSAGE          what TF_SessionRun said, the message in hexadecimal
     memory DONE KIB                         every so often in a run
     done TASKS KIB                          the run is over; TASK counted from 0 to TASKS - 1, and
                                             TASK % requests is the request it ran

   An export that does not load gives "error CODE MESSAGE" and exit status 1; a line that does not
   follow these rules gives a message on standard error and exit status 2. --no-xla does what
   tensorflow_model_server does unless told otherwise: it switches XLA off. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tensorflow/c/c_api.h"
#include "tensorflow/c/tf_tstring.h"

#define MAX_RANK 8
#define MAX_TENSORS 16
#define MAX_THREADS 64
#define MAX_BYTES ((int64_t)1 << 30)
#define REPORTS 20

/* Of libtensorflow_cc.so.2; no header of the wheel declares it for C. */
#define DISABLE_XLA "_ZN10tensorflow21DisableXlaCompilationEv"

static _Noreturn void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("run_saved_model: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  _exit(2); /* Other threads may be inside TensorFlow, which exit would take down under them. */
}

static void* grow(void* block, size_t count, size_t size) {
  block = reallocarray(block, count, size);
  if (block == NULL) fail("out of memory");
  return block;
}

/* ---- Text ---- */

typedef struct {
  char* data;
  size_t length, capacity;
} Text;

static char* text_room(Text* text, size_t bytes) {
  if (bytes > SIZE_MAX / 2 - text->length) fail("out of memory");
  size_t needed = text->length + bytes;
  if (needed > text->capacity) {
    text->capacity = needed * 2;
    text->data = grow(text->data, text->capacity, 1);
  }
  return text->data + text->length;
}

static void text_add(Text* text, const char* format, ...) {
  char word[64];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(word, sizeof word, format, arguments);
  va_end(arguments);
  if (length < 0 || (size_t)length >= sizeof word) fail("a word is too long");
  memcpy(text_room(text, (size_t)length), word, (size_t)length);
  text->length += (size_t)length;
}

static void text_add_hex(Text* text, const char* bytes, size_t size) {
  static const char digits[] = "0123456789abcdef";
  if (size == 0) {
    text_add(text, " -");
    return;
  }
  if (size > (SIZE_MAX - 1) / 2) fail("a string is too long");
  char* out = text_room(text, 2 * size + 1);
  *out++ = ' ';
  for (size_t i = 0; i < size; ++i) {
    *out++ = digits[(unsigned char)bytes[i] >> 4];
    *out++ = digits[(unsigned char)bytes[i] & 15];
  }
  text->length += 2 * size + 1;
}

static void text_write(Text* text) {
  text_add(text, "\n");
  fwrite(text->data, 1, text->length, stdout);
  if (fflush(stdout) != 0) fail("cannot write: %s", strerror(errno));
  text->length = 0;
}

static int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  fail("not a hexadecimal digit: %c", c);
}

/* Decodes in place; returns the number of bytes. */
static size_t decode_hex(char* word) {
  if (strcmp(word, "-") == 0) return 0;
  size_t size = strlen(word);
  if (size % 2 != 0) fail("hexadecimal digits come in pairs");
  for (size_t i = 0; i < size / 2; ++i)
    word[i] = (char)(hex_digit(word[2 * i]) << 4 | hex_digit(word[2 * i + 1]));
  return size / 2;
}

/* The words of one line, in order. */
static char* next_word(char** rest) {
  char* word = strsep(rest, " ");
  if (word == NULL || *word == '\0') fail("a line ends too early");
  return word;
}

static int64_t next_integer(char** rest, int64_t low, int64_t high) {
  char *word = next_word(rest), *end;
  errno = 0;
  long long value = strtoll(word, &end, 10);
  if (*end != '\0' || errno != 0 || value < low || value > high)
    fail("%s is no integer from %" PRId64 " to %" PRId64, word, low, high);
  return value;
}

static float next_float(char** rest) {
  char *word = next_word(rest), *end;
  float value = strtof(word, &end);
  if (*end != '\0') fail("%s is no number", word);
  return value;
}

/* ---- Tensors ---- */

static TF_DataType dtype_of(const char* name) {
  if (strcmp(name, "string") == 0) return TF_STRING;
  if (strcmp(name, "int32") == 0) return TF_INT32;
  if (strcmp(name, "float32") == 0) return TF_FLOAT;
  fail("dtype must be string, int32 or float32, received %s", name);
}

static size_t size_of(TF_DataType dtype) {
  return dtype == TF_STRING ? sizeof(TF_TString) : 4;
}

static TF_Tensor* read_tensor(char** rest) {
  TF_DataType dtype = dtype_of(next_word(rest));
  int rank = (int)next_integer(rest, 0, MAX_RANK);
  int64_t shape[MAX_RANK] = {0}, count = 1;
  for (int i = 0; i < rank; ++i) {
    shape[i] = next_integer(rest, 0, MAX_BYTES);
    if (shape[i] > 0 && count > MAX_BYTES / (int64_t)sizeof(TF_TString) / shape[i])
      fail("a tensor is too large");
    count *= shape[i];
  }
  TF_Tensor* tensor = TF_AllocateTensor(dtype, shape, rank, (size_t)count * size_of(dtype));
  if (tensor == NULL) fail("out of memory");
  void* data = TF_TensorData(tensor);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == TF_INT32) {
      ((int32_t*)data)[i] = (int32_t)next_integer(rest, INT32_MIN, INT32_MAX);
    } else if (dtype == TF_FLOAT) {
      ((float*)data)[i] = next_float(rest);
    } else {
      char* word = next_word(rest);
      TF_StringInit(&((TF_TString*)data)[i]);
      TF_StringCopy(&((TF_TString*)data)[i], word, decode_hex(word));
    }
  }
  return tensor;
}

/* For tensors of read_tensor, whose strings TensorFlow does not free. */
static void delete_input(TF_Tensor* tensor) {
  if (TF_TensorType(tensor) == TF_STRING) {
    TF_TString* strings = TF_TensorData(tensor);
    for (int64_t i = 0; i < TF_TensorElementCount(tensor); ++i) TF_StringDealloc(&strings[i]);
  }
  TF_DeleteTensor(tensor);
}

/* Returns false where the tensor is of another dtype. */
static bool write_tensor(Text* text, const TF_Tensor* tensor) {
  TF_DataType dtype = TF_TensorType(tensor);
  if (dtype != TF_STRING && dtype != TF_INT32 && dtype != TF_FLOAT) return false;
  int rank = TF_NumDims(tensor);
  int64_t count = TF_TensorElementCount(tensor);
  if (TF_TensorByteSize(tensor) < (size_t)count * size_of(dtype)) fail("a tensor is cut short");
  text_add(text, dtype == TF_STRING ? " string" : dtype == TF_INT32 ? " int32" : " float32");
  text_add(text, " %d", rank);
  for (int i = 0; i < rank; ++i) text_add(text, " %" PRId64, TF_Dim(tensor, i));
  const void* data = TF_TensorData(tensor);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == TF_INT32) {
      text_add(text, " %" PRId32, ((const int32_t*)data)[i]);
    } else if (dtype == TF_FLOAT) {
      text_add(text, " %.9g", (double)((const float*)data)[i]);
    } else {
      const TF_TString* string = &((const TF_TString*)data)[i];
      text_add_hex(text, TF_StringGetDataPointer(string), TF_StringGetSize(string));
    }
  }
  return true;
}

/* ---- Requests ---- */

typedef struct {
  int inputs, outputs;
  TF_Output feeds[MAX_TENSORS], fetches[MAX_TENSORS];
  TF_Tensor* values[MAX_TENSORS];
} Request;

static TF_Output read_output(char** rest, TF_Graph* graph) {
  char *name = next_word(rest), *index = strrchr(name, ':');
  if (index == NULL) fail("%s must be operation:index", name);
  *index++ = '\0';
  TF_Operation* operation = TF_GraphOperationByName(graph, name);
  if (operation == NULL) fail("the export has no operation %s", name);
  int64_t number = next_integer(&index, 0, TF_OperationNumOutputs(operation) - 1);
  return (TF_Output){operation, (int)number};
}

static Request read_request(char** rest, TF_Graph* graph) {
  Request request = {0};
  request.inputs = (int)next_integer(rest, 0, MAX_TENSORS);
  for (int i = 0; i < request.inputs; ++i) {
    request.feeds[i] = read_output(rest, graph);
    request.values[i] = read_tensor(rest);
  }
  request.outputs = (int)next_integer(rest, 1, MAX_TENSORS);
  for (int i = 0; i < request.outputs; ++i) request.fetches[i] = read_output(rest, graph);
  return request;
}

static void run_request(TF_Session* session, const TF_Buffer* options, const Request* request,
                        TF_Status* status, int64_t task, Text* text) {
  TF_Tensor* results[MAX_TENSORS] = {0};
  TF_SessionRun(session, options, request->feeds, request->values, request->inputs,
                request->fetches, results, request->outputs, NULL, 0, NULL, status);
  text_add(text, "answer %" PRId64, task);
  if (TF_GetCode(status) == TF_OK) {
    text_add(text, " ok");
    for (int i = 0; i < request->outputs; ++i) {
      if (!write_tensor(text, results[i])) fail("an output is of another dtype");
      TF_DeleteTensor(results[i]);
    }
  } else {
    text_add(text, " error %d", (int)TF_GetCode(status));
    text_add_hex(text, TF_Message(status), strlen(TF_Message(status)));
  }
}

/* ---- Threads ---- */

typedef struct {
  TF_Session* session;
  const TF_Buffer* options;
  const Request* requests;
  int64_t count, tasks;
  pthread_mutex_t lock; /* of what follows and of standard output */
  int64_t next, done;
} Work;

static long resident_kib(void) {
  FILE* file = fopen("/proc/self/status", "r");
  if (file == NULL) fail("cannot read /proc/self/status");
  char line[256];
  long kib = -1;
  while (kib < 0 && fgets(line, sizeof line, file) != NULL) sscanf(line, "VmRSS: %ld", &kib);
  fclose(file);
  return kib;
}

static void* work(void* argument) {
  Work* work = argument;
  TF_Status* status = TF_NewStatus();
  Text text = {0};
  pthread_mutex_lock(&work->lock);
  while (work->next < work->tasks) {
    int64_t task = work->next++;
    pthread_mutex_unlock(&work->lock);
    run_request(work->session, work->options, &work->requests[task % work->count], status, task,
                &text);
    pthread_mutex_lock(&work->lock);
    text_write(&text);
    ++work->done;
    if (work->done * REPORTS / work->tasks > (work->done - 1) * REPORTS / work->tasks) {
      printf("memory %" PRId64 " %ld\n", work->done, resident_kib());
    }
  }
  pthread_mutex_unlock(&work->lock);
  free(text.data);
  TF_DeleteStatus(status);
  return NULL;
}

static void run_all(TF_Session* session, const Request* requests, int64_t count, char** rest) {
  int threads = (int)next_integer(rest, 1, MAX_THREADS);
  int64_t times = next_integer(rest, 0, INT32_MAX);
  if (count > INT32_MAX) fail("too many requests");
  char* options = next_word(rest);
  size_t size = decode_hex(options);
  Work shared = {.session = session,
                 .options = size > 0 ? TF_NewBufferFromString(options, size) : NULL,
                 .requests = requests,
                 .count = count,
                 .tasks = count * times,
                 .lock = PTHREAD_MUTEX_INITIALIZER};
  pthread_t ids[MAX_THREADS];
  for (int i = 0; i < threads; ++i)
    if (pthread_create(&ids[i], NULL, work, &shared) != 0) fail("cannot start a thread");
  for (int i = 0; i < threads; ++i) pthread_join(ids[i], NULL);
  pthread_mutex_destroy(&shared.lock);
  TF_DeleteBuffer((TF_Buffer*)shared.options);
  printf("done %" PRId64 " %ld\n", shared.tasks, resident_kib());
  fflush(stdout);
}

static void obey(TF_Session* session, TF_Graph* graph) {
  Request* requests = NULL;
  int64_t count = 0;
  char* line = NULL;
  size_t capacity = 0;
  ssize_t length;
  while ((length = getline(&line, &capacity, stdin)) > 0) {
    if (line[length - 1] == '\n') line[length - 1] = '\0';
    char* rest = line;
    char* command = next_word(&rest);
    if (strcmp(command, "request") == 0) {
      requests = grow(requests, (size_t)count + 1, sizeof *requests);
      requests[count++] = read_request(&rest, graph);
    } else if (strcmp(command, "run") == 0) {
      run_all(session, requests, count, &rest);
      for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < requests[i].inputs; ++j) delete_input(requests[i].values[j]);
      count = 0;
    } else {
      fail("the command must be request or run, received %s", command);
    }
    if (rest != NULL) fail("a line is too long: %s", rest);
  }
  if (count > 0) fail("requests without a run");
  free(requests);
  free(line);
}

static void check_load(const TF_Status* status) {
  if (TF_GetCode(status) == TF_OK) return;
  Text text = {0};
  text_add(&text, "error %d", (int)TF_GetCode(status));
  text_add_hex(&text, TF_Message(status), strlen(TF_Message(status)));
  text_write(&text);
  exit(1);
}

int main(int argc, char** argv) {
  int first = 1;
  if (argc > 1 && strcmp(argv[1], "--no-xla") == 0) {
    void (*disable_xla)(void);
    *(void**)&disable_xla = dlsym(RTLD_DEFAULT, DISABLE_XLA);
    if (disable_xla == NULL) fail("TensorFlow has no symbol " DISABLE_XLA);
    disable_xla();
    ++first;
  }
  if (argc <= first) fail("usage: run_saved_model [--no-xla] EXPORT [LIBRARY...]");
  TF_Status* status = TF_NewStatus();
  for (int i = first + 1; i < argc; ++i) {
    TF_Library* library = TF_LoadLibrary(argv[i], status);
    check_load(status);
    TF_DeleteLibraryHandle(library); /* The ops stay. */
  }
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* const tags[] = {"serve"};
  TF_Session* session =
      TF_LoadSessionFromSavedModel(options, NULL, argv[first], tags, 1, graph, NULL, status);
  check_load(status);
  printf("loaded %s %ld\n", TF_Version(), resident_kib());
  fflush(stdout);
  obey(session, graph);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
