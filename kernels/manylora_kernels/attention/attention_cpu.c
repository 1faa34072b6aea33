/* Attention of decodes over keys and values that lie anywhere in a cache: one query for each sequence.

   Shape key: B sequences, H query heads, V key/value heads, G = H / V, D key size, E value size, C longest context.

   out[b, h] = sum over c of softmax(scaling * <q[b, h], key[c]>) * value[c], c from the window's start to the sequence's
   position. Nothing is gathered: each key and value is read where it lies, once for the G heads that share it. A task
   is one key/value head of one sequence, so a sequence's bits are the same alone and in any batch. */

#include "../vec.h"

#define CHUNK 64 /* tokens whose values are added while they are in the nearest cache */
#define AHEAD 8  /* tokens between asking memory for a key and using it */
#define LINE 64  /* bytes */

struct decode {
    const void *keys, *values;      /* rows of V * D and V * E elements */
    const int64_t *context;         /* [B, C] row of each token */
    const int64_t *positions;       /* [B] of the query: it sees itself and what came before */
    const void *q;
    void *out;
    int64_t q_head, q_row, out_head, out_row; /* elements from one to the next */
    int64_t num_seqs, num_kv, per_kv, key_size, value_size, max_context;
    int64_t window; /* tokens seen at most; 0 is all */
    float *scratch; /* per thread: G * (C + 1 + LANES + E + 1) */
    int64_t scratch_per_thread;
    int64_t type;
    float scaling;
};

INLINE void prefetch(const void *p, int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += LINE) __builtin_prefetch((const char *)p + i);
}

/* Scores of the tokens start .. end-1, and behind them at most one that counts for nothing. */
INLINE void score(const struct decode *d, const int64_t *rows, int64_t kv, const void *q, int64_t start, int64_t end,
                  float *scores, int64_t scores_row, int type) {
    float scales[ROWS] = {d->scaling, d->scaling, d->scaling, d->scaling};
    int64_t key_row = d->num_kv * d->key_size, size = d->key_size, element = type == FLOAT32 ? 4 : 2;
    int64_t value_row = d->num_kv * d->value_size;
    for (int64_t c = start; c < end; c += ACROSS) {
        for (int64_t i = c; i < c + ACROSS && i < end; i++) {
            if (i + AHEAD < end)
                prefetch(at(d->keys, rows[i + AHEAD] * key_row + kv * size, type), size * element);
            prefetch(at(d->values, rows[i] * value_row + kv * d->value_size, type), d->value_size * element);
        }
        int64_t next = c + 1 < end ? c + 1 : c;
        const void *w[ACROSS] = {at(d->keys, rows[c] * key_row + kv * size, type),
                                 at(d->keys, rows[next] * key_row + kv * size, type)};
        for (int64_t first = 0; first < d->per_kv; first += ROWS) {
            const void *head[ROWS];
            int count = d->per_kv - first < ROWS ? (int)(d->per_kv - first) : ROWS;
            for (int r = 0; r < count; r++) head[r] = at(q, (first + r) * d->q_head, type);
            dot_rows(w, head, scales, scores + first * scores_row + c - start, scores_row, size, count, type);
        }
    }
}

/* Scores become e^(score - most); returns their sum. What is behind them, up to a whole vector, becomes 0. */
INLINE float exponentiate(float *scores, int64_t count) {
    float most = scores[0];
    for (int64_t c = 1; c < count; c++) most = scores[c] > most ? scores[c] : most;
    vec total = (vec){0};
    for (int64_t c = 0; c < count; c += LANES) {
        if (c + LANES > count)
            for (int64_t beyond = count; beyond < c + LANES; beyond++) scores[beyond] = most - 1e30f;
        vec p = exp_negative(*(vec *)(scores + c) - most);
        *(vec *)(scores + c) = p;
        total += p;
    }
    return sum(total);
}

/* sums[r, 0 .. E) += p[r, c] * value[c] for `count` heads and tokens start .. end-1. */
INLINE void add_values(const struct decode *d, const int64_t *rows, int64_t kv, int64_t start, int64_t end,
                       const float *p, int64_t p_row, float *sums, int count, int type) {
    int64_t value_row = d->num_kv * d->value_size, size = d->value_size, n = 0;
#define BLOCK(VECTORS)                                                                                                 \
    for (; n + VECTORS * LANES <= size; n += VECTORS * LANES) {                                                        \
        vec acc[ROWS][ACROSS];                                                                                         \
        UNROLLED                                                                                                       \
        for (int r = 0; r < count; r++)                                                                                \
            UNROLLED                                                                                                   \
            for (int v = 0; v < VECTORS; v++) acc[r][v] = *(vec *)(sums + r * size + n + v * LANES);                   \
        for (int64_t c = start; c < end; c++) {                                                                        \
            const void *value = at(d->values, rows[c] * value_row + kv * size + n, type);                              \
            vec u[ACROSS];                                                                                             \
            UNROLLED                                                                                                   \
            for (int v = 0; v < VECTORS; v++) u[v] = load(value, v * LANES, type);                                     \
            UNROLLED                                                                                                   \
            for (int r = 0; r < count; r++) {                                                                          \
                float factor = p[r * p_row + c];                                                                       \
                UNROLLED                                                                                               \
                for (int v = 0; v < VECTORS; v++) acc[r][v] += factor * u[v];                                          \
            }                                                                                                          \
        }                                                                                                              \
        UNROLLED                                                                                                       \
        for (int r = 0; r < count; r++)                                                                                \
            UNROLLED                                                                                                   \
            for (int v = 0; v < VECTORS; v++) *(vec *)(sums + r * size + n + v * LANES) = acc[r][v];                   \
    }
    BLOCK(2)
    BLOCK(1)
#undef BLOCK
    for (; n < size; n++)
        for (int r = 0; r < count; r++)
            for (int64_t c = start; c < end; c++)
                sums[r * size + n] += p[r * p_row + c] * load1(d->values, rows[c] * value_row + kv * size + n, type);
}

/* One key/value head of one sequence. */
INLINE void decode_task(const struct decode *d, int64_t seq, int64_t kv, float *scratch, int type) {
    int64_t end = d->positions[seq] + 1, start = d->window && end > d->window ? end - d->window : 0;
    int64_t count = end - start, scores_row = d->max_context + 1 + LANES, size = d->value_size;
    const int64_t *rows = d->context + seq * d->max_context;
    const void *q = at(d->q, seq * d->q_row + kv * d->per_kv * d->q_head, type);
    float *scores = scratch, *sums = scratch + d->per_kv * scores_row, *totals = sums + d->per_kv * size;
    score(d, rows, kv, q, start, end, scores, scores_row, type);
    for (int64_t g = 0; g < d->per_kv; g++) totals[g] = exponentiate(scores + g * scores_row, count);
    memset(sums, 0, sizeof(float) * d->per_kv * size);
    for (int64_t chunk = 0; chunk < count; chunk += CHUNK) {
        int64_t stop = chunk + CHUNK < count ? chunk + CHUNK : count;
        for (int64_t g = 0; g < d->per_kv; g += ROWS) {
            const float *p = scores + g * scores_row;
            float *mine = sums + g * size;
            switch (d->per_kv - g) {
            case 1: add_values(d, rows + start, kv, chunk, stop, p, scores_row, mine, 1, type); break;
            case 2: add_values(d, rows + start, kv, chunk, stop, p, scores_row, mine, 2, type); break;
            case 3: add_values(d, rows + start, kv, chunk, stop, p, scores_row, mine, 3, type); break;
            default: add_values(d, rows + start, kv, chunk, stop, p, scores_row, mine, 4, type);
            }
        }
    }
    for (int64_t g = 0; g < d->per_kv; g++) {
        void *out = (void *)at(d->out, seq * d->out_row + (kv * d->per_kv + g) * d->out_head, type);
        for (int64_t n = 0; n < size; n++) store1(out, n, sums[g * size + n] / totals[g], type);
    }
}

INLINE void decode(const struct decode *d, int num_threads, int type) {
#pragma omp parallel num_threads(num_threads)
    {
#ifdef _OPENMP
        float *scratch = d->scratch + omp_get_thread_num() * d->scratch_per_thread;
#else
        float *scratch = d->scratch;
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < d->num_seqs * d->num_kv; task++)
            decode_task(d, task / d->num_kv, task % d->num_kv, scratch, type);
    }
}

void manylora_decode(const struct decode *d, int64_t num_threads) {
    if (d->type == FLOAT32)
        decode(d, (int)num_threads, FLOAT32);
    else
        decode(d, (int)num_threads, BFLOAT16);
}
