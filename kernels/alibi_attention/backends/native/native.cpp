// ALiBi attention on a CPU: forward and backward in tiles, with the early exit past the horizon (horizon.py has the proof).
//
// A tile is kBlock queries x kBlock keys. Scores are kept transposed, S^T[key][query]: queries are the lanes of a vector, so
// that maxima, sums and the bias are plain vector arithmetic and nothing is ever reduced across lanes. All arithmetic is
// fp32, whatever the type of the inputs; the bias is the fp32 slope times an integer distance, rounded once.
//
// Plain C++17 with the vector extensions of GCC and Clang, no header of PyTorch: it compiles in seconds (library.py does).
#include "native_tile.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

// What attend.py passes, field for field. Strides and bases count elements.
struct Sequence {  // a row of the batch, or a document
  int64_t q_base, k_base, v_base;
  int64_t first_query, first_key, first_query_block;  // counted over all sequences
  int64_t num_queries, num_keys;
};

struct Problem {
  const void *q, *k, *v, *out, *grad_out;
  void *result_q, *result_k, *result_v;  // forward: the output in result_q; backward: dq, dk, dv
  float *largest, *inverse_sum;          // [heads][all queries]: not as log-sum-exp, which would round their product
  int32_t* first_block;                  // [heads][all query blocks]: the leftmost key block that a query block visits
  const float* slopes;                   // [heads]
  const Sequence* sequences;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  int64_t result_token;  // of dq, dk and dv, whose heads are dense; the output and its gradient are dense throughout
  int64_t num_sequences, num_heads, head_dim, total_queries, total_query_blocks, query_offset, num_threads;
  float softmax_scale;
  double horizon_eps;  // as it was asked for: rounded to fp32 it may be more
};

namespace {

constexpr int kBlock = 64;                      // queries and keys of a tile
constexpr int kBlockVectors = kBlock / kLanes;  // vectors of queries
constexpr float kNormMargin = 1.0f + 0x1p-12f;  // covers the rounding of norms and scores up to 256 dimensions
constexpr float kTinySquares = 0x1p-118f;       // covers the squares of 256 dimensions that underflow

int64_t num_blocks(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }

int64_t padded(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// Rows of one head as fp32, padded with zeros to whole vectors.
template <typename T>
void read_rows(const T* x, int64_t token_stride, int64_t rows, int64_t head_dim, float* to, int64_t width) {
  for (int64_t i = 0; i < rows; ++i, x += token_stride, to += width) {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = float(x[d]);
    for (int64_t d = head_dim; d < width; ++d) to[d] = 0.0f;
  }
}

// [head_dim][kBlock] from rows; the queries that a block lacks become zeros.
void transpose(const float* rows, int count, int64_t width, int64_t head_dim, float factor, float* to) {
  for (int64_t d = 0; d < head_dim; ++d, to += kBlock) {
    for (int i = 0; i < count; ++i) to[i] = rows[i * width + d] * factor;
    for (int i = count; i < kBlock; ++i) to[i] = 0.0f;
  }
}

template <typename T>
void write_rows(const float* rows, int64_t width, int64_t count, int64_t head_dim, T* to, int64_t token_stride) {
  for (int64_t i = 0; i < count; ++i, rows += width, to += token_stride)
    for (int64_t d = 0; d < head_dim; ++d) to[d] = T(rows[d]);
}

// Keys of one sequence and head, and what the horizon has to know of them.
struct Keys {
  float *k, *v;         // [keys][width]
  float* largest_norm;  // [key blocks]: of this block and all before it; the backward has no use for it
};

template <typename T>
void read_keys(const Problem& p, const Sequence& s, int64_t head, int64_t width, Keys keys) {
  const T *k = static_cast<const T*>(p.k) + s.k_base + head * p.k_head, *v = static_cast<const T*>(p.v) + s.v_base + head * p.v_head;
  read_rows(k, p.k_token, s.num_keys, p.head_dim, keys.k, width);
  read_rows(v, p.v_token, s.num_keys, p.head_dim, keys.v, width);
  if (!keys.largest_norm) return;
  float largest = 0.0f;
  for (int64_t j = 0; j < s.num_keys; ++j) {
    float square = kTinySquares;
    for (int64_t d = 0; d < width; ++d) square += keys.k[j * width + d] * keys.k[j * width + d];
    if (square > largest || square != square) largest = square;  // a NaN is the largest, and stays it
    keys.largest_norm[j / kBlock] = std::sqrt(largest);
  }
}

// Where the queries of one block stand, and the bias and mask that follow.
struct Place {
  alignas(64) int32_t position[kBlock];
  int32_t first;
  float slope;

  // A query beyond the last key sees all keys, and only their distances from each other matter to its softmax: put at the
  // last key, it gets a bias without a large common part, which would cost digits.
  Place(int64_t first_position, int64_t num_keys, float slope) : first(int32_t(first_position)), slope(slope) {
    for (int i = 0; i < kBlock; ++i) position[i] = int32_t(std::min(first_position + i, num_keys - 1));
  }

  bool is_masked(int64_t first_key, int keys) const { return first_key + keys - 1 > first; }

  // Scores of a key with kLanes queries, with the bias, and -inf where the key lies in the future.
  template <bool masked>
  Vector biased(const float* score, int64_t key, int v) const {
    const Integers distance = *reinterpret_cast<const Integers*>(position + v * kLanes) - int32_t(key);
    const Vector result = load(score) - slope * __builtin_convertvector(distance, Vector);
    return masked ? (distance < 0 ? Vector{} - kInfinity : result) : result;
  }
};

// Running softmax of one query block.
struct Softmax {
  alignas(64) float largest[kBlock], sum[kBlock], correction[kBlock];
  alignas(64) float query_norm[kBlock];  // |softmax_scale| * |q|, with the margin

  // Turns scores into weights relative to the running maximum; true if earlier results have to be corrected.
  template <bool masked>
  bool update(float* scores, int64_t first_key, int keys, const Place& place) {
    Vector top[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) top[v] = load(largest + v * kLanes);
    for (int j = 0; j < keys; ++j)
      for (int v = 0; v < kBlockVectors; ++v)
        top[v] = max(place.biased<masked>(scores + j * kBlock + v * kLanes, first_key + j, v), top[v]);
    bool changed = false;
    for (int v = 0; v < kBlockVectors; ++v) {
      const Vector before = load(largest + v * kLanes);
      const Vector factor = before == top[v] ? Vector{} + 1.0f : exp(before - top[v]);
      for (int l = 0; l < kLanes; ++l) changed |= factor[l] != 1.0f;
      store(correction + v * kLanes, factor);
      store(largest + v * kLanes, top[v]);
    }
    Vector total[kBlockVectors], reference[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) {
      total[v] = Vector{};  // of this tile, for short rounding errors as in multiply_tile
      reference[v] = top[v] == -kInfinity ? Vector{} : top[v];  // a query that has seen no key yet
    }
    for (int j = 0; j < keys; ++j)
      for (int v = 0; v < kBlockVectors; ++v) {
        float* score = scores + j * kBlock + v * kLanes;
        const Vector weight = exp(place.biased<masked>(score, first_key + j, v) - reference[v]);
        total[v] += weight;
        store(score, weight);
      }
    for (int v = 0; v < kBlockVectors; ++v)
      store(sum + v * kLanes, total[v] + load(sum + v * kLanes) * load(correction + v * kLanes));
    return changed;
  }

  // Whether the keys before `end` may be left out: together they hold at most the share eps of every query's mass.
  bool is_past_horizon(int64_t end, double largest_key_norm, double log_eps, int queries, const Place& place) const {
    if (!(place.slope > 0.0f)) return false;
    const double slope = place.slope, log_mass = std::min(std::log(double(end)), -std::log(-std::expm1(-slope)));
    for (int i = 0; i < queries; ++i) {
      const double nearest = slope * double(place.position[i] - (end - 1));
      if (!(query_norm[i] * largest_key_norm - nearest + log_mass <= largest[i] + log_eps)) return false;  // or NaN
    }
    return true;
  }
};

template <typename T>
void forward_block(const Problem& p, const Sequence& s, int64_t head, int64_t block, const Keys& keys, float* work) {
  const int64_t width = padded(p.head_dim), first = block * kBlock;
  const int queries = int(std::min<int64_t>(kBlock, s.num_queries - first));
  float *q_rows = work, *q_T = q_rows + kBlock * width, *scores = q_T + kBlock * width, *sums = scores + kBlock * kBlock;
  const T* q = static_cast<const T*>(p.q) + s.q_base + head * p.q_head + first * p.q_token;
  read_rows(q, p.q_token, queries, p.head_dim, q_rows, width);
  transpose(q_rows, queries, width, p.head_dim, p.softmax_scale, q_T);

  Softmax softmax;
  for (int i = 0; i < kBlock; ++i) {
    float square = kTinySquares;
    for (int64_t d = 0; d < p.head_dim; ++d) square += q_T[d * kBlock + i] * q_T[d * kBlock + i];
    softmax.query_norm[i] = std::sqrt(square) * kNormMargin;
    softmax.largest[i] = -kInfinity;
    softmax.sum[i] = 0.0f;
  }

  const Place place(p.query_offset + first, s.num_keys, p.slopes[head]);
  const double log_eps = std::log(p.horizon_eps);  // -inf for 0: never past the horizon
  const int64_t visible = std::min(s.num_keys, p.query_offset + first + queries);
  bool accumulate = false;
  int64_t key_block = num_blocks(visible) - 1;
  for (;; --key_block) {
    const int64_t first_key = key_block * kBlock;
    const int count = int(std::min<int64_t>(kBlock, visible - first_key));
    multiply(count, kBlock, int(p.head_dim), {keys.k + first_key * width, width, 1}, q_T, kBlock, scores, kBlock, false);
    const bool changed = place.is_masked(first_key, count) ? softmax.update<true>(scores, first_key, count, place)
                                                           : softmax.update<false>(scores, first_key, count, place);
    multiply(queries, int(width), count, {scores, 1, kBlock}, keys.v + first_key * width, width, sums, width, accumulate,
             accumulate && changed ? softmax.correction : nullptr);
    accumulate = true;
    if (key_block == 0) break;
    if (softmax.is_past_horizon(first_key, keys.largest_norm[key_block - 1], log_eps, queries, place)) break;
  }
  p.first_block[head * p.total_query_blocks + s.first_query_block + block] = int32_t(key_block);

  const int64_t statistic = head * p.total_queries + s.first_query + first;
  for (int i = 0; i < queries; ++i) {
    const float inverse = 1.0f / softmax.sum[i];
    for (int64_t d = 0; d < width; ++d) sums[i * width + d] *= inverse;
    p.largest[statistic + i] = softmax.largest[i];
    p.inverse_sum[statistic + i] = inverse;
  }
  T* out = static_cast<T*>(p.result_q) + ((s.first_query + first) * p.num_heads + head) * p.head_dim;
  write_rows(sums, width, queries, p.head_dim, out, p.num_heads * p.head_dim);
}

// Weights and their gradients from the scores and the products grad_out v, in place.
template <bool masked>
void differentiate(float* scores, float* products, int64_t first_key, int keys, const Place& place, const float* largest,
                   const float* inverse_sum, const float* delta, float scale) {
  for (int v = 0; v < kBlockVectors; ++v) {
    const Vector top = load(largest + v * kLanes), inverse = load(inverse_sum + v * kLanes), mean = load(delta + v * kLanes);
    for (int j = 0; j < keys; ++j) {
      float *score = scores + j * kBlock + v * kLanes, *product = products + j * kBlock + v * kLanes;
      const Vector weight = exp(place.biased<masked>(score, first_key + j, v) - top) * inverse;
      store(score, weight);
      store(product, weight * (load(product) - mean) * scale);
    }
  }
}

template <typename T>
void backward_block(const Problem& p, const Sequence& s, int64_t head, int64_t block, const Keys& keys, float* grad_k,
                    float* grad_v, float* work) {
  const int64_t width = padded(p.head_dim), first = block * kBlock, tokens = p.num_heads * p.head_dim;
  const int queries = int(std::min<int64_t>(kBlock, s.num_queries - first));
  float *q = work, *grad = q + kBlock * width, *q_T = grad + kBlock * width, *grad_T = q_T + kBlock * width;
  float *grad_q = grad_T + kBlock * width, *scores = grad_q + kBlock * width, *products = scores + kBlock * kBlock;
  const int64_t at = ((s.first_query + first) * p.num_heads + head) * p.head_dim;  // in what is contiguous
  const T* out = static_cast<const T*>(p.out) + at;
  read_rows(static_cast<const T*>(p.q) + s.q_base + head * p.q_head + first * p.q_token, p.q_token, queries,
            p.head_dim, q, width);
  read_rows(static_cast<const T*>(p.grad_out) + at, tokens, queries, p.head_dim, grad, width);
  transpose(q, queries, width, p.head_dim, p.softmax_scale, q_T);
  transpose(grad, queries, width, p.head_dim, 1.0f, grad_T);

  alignas(64) float largest[kBlock] = {}, inverse_sum[kBlock] = {}, delta[kBlock] = {};
  const int64_t statistic = head * p.total_queries + s.first_query + first;
  for (int i = 0; i < queries; ++i) {
    largest[i] = p.largest[statistic + i];
    inverse_sum[i] = p.inverse_sum[statistic + i];
    for (int64_t d = 0; d < p.head_dim; ++d) delta[i] += grad[i * width + d] * float(out[i * tokens + d]);
  }

  const Place place(p.query_offset + first, s.num_keys, p.slopes[head]);
  const int64_t visible = std::min(s.num_keys, p.query_offset + first + queries);
  const int64_t last_block = num_blocks(visible) - 1;
  const int64_t first_block = p.first_block[head * p.total_query_blocks + s.first_query_block + block];
  for (int64_t key_block = last_block; key_block >= first_block; --key_block) {
    const int64_t first_key = key_block * kBlock, row = first_key * width;
    const int count = int(std::min<int64_t>(kBlock, visible - first_key)), depth = int(p.head_dim);
    multiply(count, kBlock, depth, {keys.k + row, width, 1}, q_T, kBlock, scores, kBlock, false);
    multiply(count, kBlock, depth, {keys.v + row, width, 1}, grad_T, kBlock, products, kBlock, false);
    (place.is_masked(first_key, count) ? differentiate<true> : differentiate<false>)(
        scores, products, first_key, count, place, largest, inverse_sum, delta, p.softmax_scale);
    multiply(count, int(width), queries, {scores, kBlock, 1}, grad, width, grad_v + row, width, true);
    multiply(count, int(width), queries, {products, kBlock, 1}, q, width, grad_k + row, width, true);
    multiply(queries, int(width), count, {products, 1, kBlock}, keys.k + row, width, grad_q, width, key_block != last_block);
  }
  T* result = static_cast<T*>(p.result_q) + (s.first_query + first) * p.result_token + head * p.head_dim;
  write_rows(grad_q, width, queries, p.head_dim, result, p.result_token);
}

// Calls body(task, memory of the thread) for every task, in their order, each on whichever thread is free.
template <typename Body>
void parallel(int64_t tasks, int64_t num_threads, int64_t work_size, const Body& body) {
  const int threads = int(std::max<int64_t>(1, std::min(tasks, num_threads)));
  const Buffer work(threads * work_size);  // here, since an exception must not leave the parallel region
  std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread)
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      body(task, work.data + thread * work_size);
}

// Heads by falling work: a flat slope has a far horizon. Threads that take the longest tasks first end together.
std::vector<int64_t> heads_by_work(const Problem& p) {
  std::vector<int64_t> heads(p.num_heads);
  std::iota(heads.begin(), heads.end(), 0);
  std::stable_sort(heads.begin(), heads.end(), [&](int64_t a, int64_t b) { return p.slopes[a] < p.slopes[b]; });
  return heads;
}

template <typename T>
void forward(const Problem& p) {
  const int64_t width = padded(p.head_dim);
  const Sequence& last = p.sequences[p.num_sequences - 1];
  const int64_t keys_of_head = last.first_key + last.num_keys;
  const int64_t norms_of_head = keys_of_head / kBlock + p.num_sequences;  // a partial block for each sequence
  const Buffer k(p.num_heads * keys_of_head * width), v(p.num_heads * keys_of_head * width);
  const Buffer norms(p.num_heads * norms_of_head);
  const auto keys_of = [&](int64_t sequence, int64_t head) {
    const int64_t first_key = p.sequences[sequence].first_key, row = (head * keys_of_head + first_key) * width;
    return Keys{k.data + row, v.data + row, norms.data + head * norms_of_head + first_key / kBlock + sequence};
  };
  parallel(p.num_sequences * p.num_heads, p.num_threads, 0, [&](int64_t task, float*) {
    const int64_t sequence = task / p.num_heads, head = task % p.num_heads;
    read_keys<T>(p, p.sequences[sequence], head, width, keys_of(sequence, head));
  });

  struct Task {
    int64_t head, sequence, block;
  };
  std::vector<Task> tasks;
  tasks.reserve(p.num_heads * p.total_query_blocks);
  for (const int64_t head : heads_by_work(p))
    for (int64_t sequence = 0; sequence < p.num_sequences; ++sequence)
      for (int64_t block = num_blocks(p.sequences[sequence].num_queries) - 1; block >= 0; --block)
        tasks.push_back({head, sequence, block});
  parallel(int64_t(tasks.size()), p.num_threads, 3 * kBlock * width + kBlock * kBlock, [&](int64_t task, float* work) {
    const auto [head, sequence, block] = tasks[task];
    forward_block<T>(p, p.sequences[sequence], head, block, keys_of(sequence, head), work);
  });
}

template <typename T>
void backward(const Problem& p) {
  const int64_t width = padded(p.head_dim);
  int64_t most_keys = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i) most_keys = std::max(most_keys, p.sequences[i].num_keys);
  const std::vector<int64_t> heads = heads_by_work(p);
  const int64_t work_size = 4 * most_keys * width + 5 * kBlock * width + 2 * kBlock * kBlock;
  parallel(p.num_sequences * p.num_heads, p.num_threads, work_size, [&](int64_t task, float* work) {
    const int64_t head = heads[task / p.num_sequences];
    const Sequence& s = p.sequences[task % p.num_sequences];
    const int64_t size = s.num_keys * width;
    float *k = work, *v = k + size, *grad_k = v + size, *grad_v = grad_k + size, *rest = grad_v + size;
    const Keys keys{k, v, nullptr};
    read_keys<T>(p, s, head, width, keys);
    std::fill(grad_k, rest, 0.0f);
    for (int64_t block = 0; block < num_blocks(s.num_queries); ++block)
      backward_block<T>(p, s, head, block, keys, grad_k, grad_v, rest);
    const int64_t at = s.first_key * p.result_token + head * p.head_dim;
    write_rows(grad_k, width, s.num_keys, p.head_dim, static_cast<T*>(p.result_k) + at, p.result_token);
    write_rows(grad_v, width, s.num_keys, p.head_dim, static_cast<T*>(p.result_v) + at, p.result_token);
  });
}

}  // namespace

// 0, or 1 if there is not enough memory.
#define ALIBI_EXPORT(direction, name, T)                         \
  extern "C" int alibi_##direction##_##name(const Problem* p) { \
    try {                                                        \
      direction<T>(*p);                                          \
      return 0;                                                  \
    } catch (const std::bad_alloc&) {                            \
      return 1;                                                  \
    }                                                            \
  }
ALIBI_EXPORT(forward, float32, float)
ALIBI_EXPORT(forward, bfloat16, BFloat16)
ALIBI_EXPORT(backward, float32, float)
ALIBI_EXPORT(backward, bfloat16, BFloat16)
#ifdef __FLT16_MAX__  // a compiler without the type leaves it to the other back ends
ALIBI_EXPORT(forward, float16, _Float16)
ALIBI_EXPORT(backward, float16, _Float16)
#endif
