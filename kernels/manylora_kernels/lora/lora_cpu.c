/* The adapters' term of one site on a CPU: y[t, s] += scale[t] * (x[t] A_s^T) B_s^T. Rows whose adapter has vectors
   become y * scale_v + offset_v after that, before they are rounded; [V, N] each.

   Shape key: T rows in segment order, G segments, S linears, K inputs, N outputs of all S, P pages, R = 16 rank rows
   of a page. a is [P, S, R, K], b is [P, R, N]; h is scratch, [entry, S, R] with one entry for each page of each row.

   Two passes over the site with a barrier between: shrink fills h, expand adds to y. A task is one page, or one run of
   columns, of one segment: its weights come from memory once and serve all rows of the segment, 4 at a time. The sum
   of a row is made in an order that depends on K, N and the row's pages only, so a row's bits are the same alone and in
   any mix, with any number of threads. */

#include "../vec.h"

#define RANK_ROWS 16
#define COLUMNS 64 /* of an expand task */

struct site {
    const void *a, *b;
    int64_t a_page, b_page; /* elements from page to page */
    int64_t num_inputs, num_outputs, num_linears;
    const int64_t *ends; /* [S] where each linear's outputs end */
    const void *scale, *offset; /* vectors, NULL in a pool without */
};

struct routing {
    int64_t num_segments, num_entries;
    const int32_t *rows;        /* [T] row of x and y */
    const float *scales;        /* [T] */
    const int32_t *row_starts;  /* [G + 1] into rows */
    const int32_t *page_starts; /* [G + 1] into pages */
    const int32_t *pages;
    const int32_t *entry_starts; /* [G] first entry of h: one for each row of each page, page after page */
    const int32_t *vectors;      /* [G] page of the segment's vectors, -1 for none */
};

/* The vectors of one segment, NULL without. */
struct vectors {
    const void *scale, *offset;
};

/* One page of one linear for all rows of a segment. */
INLINE void shrink_task(const void *a, const void *x, int64_t x_row, const int32_t *rows, const float *scales,
                        int64_t num_rows, float *h, int64_t h_row, int64_t k, int type) {
    for (int64_t first = 0; first < num_rows; first += ROWS) {
        const void *row[ROWS];
        int count = num_rows - first < ROWS ? (int)(num_rows - first) : ROWS;
        for (int r = 0; r < count; r++) row[r] = at(x, rows[first + r] * x_row, type);
        for (int j = 0; j < RANK_ROWS; j += ACROSS) {
            const void *w[ACROSS] = {at(a, j * k, type), at(a, (j + 1) * k, type)};
            dot_rows(w, row, scales + first, h + first * h_row + j, h_row, k, count, type);
        }
    }
}

/* y[r, n .. n + 16 V) += sum over pages and rank rows of h * b, then scaled and offset, for `count` rows. */
INLINE void expand_block(const struct site *site, const int32_t *pages, int64_t num_pages, struct vectors of, int64_t n,
                         const float *h, int64_t h_row, int64_t h_page, void *const *y, int count, int vectors,
                         int type) {
    vec acc[ROWS][ACROSS];
    UNROLLED
    for (int r = 0; r < count; r++)
        UNROLLED
        for (int v = 0; v < vectors; v++) acc[r][v] = (vec){0};
    for (int64_t p = 0; p < num_pages; p++) {
        const void *b = at(site->b, pages[p] * site->b_page + n, type);
        for (int j = 0; j < RANK_ROWS; j++) {
            vec w[ACROSS];
            UNROLLED
            for (int v = 0; v < vectors; v++) w[v] = load(b, j * site->num_outputs + v * LANES, type);
            __builtin_prefetch(at(b, j * site->num_outputs + COLUMNS, type));
            UNROLLED
            for (int r = 0; r < count; r++) {
                float factor = h[p * h_page + r * h_row + j];
                UNROLLED
                for (int v = 0; v < vectors; v++) acc[r][v] += factor * w[v];
            }
        }
    }
    UNROLLED
    for (int r = 0; r < count; r++)
        UNROLLED
        for (int v = 0; v < vectors; v++) {
            int64_t at_v = n + v * LANES;
            vec sum = load(y[r], at_v, type) + acc[r][v];
            if (of.scale) sum = sum * load(of.scale, at_v, type) + load(of.offset, at_v, type);
            store(y[r], at_v, sum, type);
        }
}

/* Columns that fill no vector. */
INLINE void expand_rest(const struct site *site, const int32_t *pages, int64_t num_pages, struct vectors of, int64_t n,
                        int64_t end, const float *h, int64_t h_row, int64_t h_page, void *const *y, int count,
                        int type) {
    for (; n < end; n++)
        for (int r = 0; r < count; r++) {
            float total = 0;
            for (int64_t p = 0; p < num_pages; p++)
                for (int j = 0; j < RANK_ROWS; j++)
                    total += h[p * h_page + r * h_row + j] *
                             load1(site->b, pages[p] * site->b_page + j * site->num_outputs + n, type);
            total = load1(y[r], n, type) + total;
            if (of.scale) total = total * load1(of.scale, n, type) + load1(of.offset, n, type);
            store1(y[r], n, total, type);
        }
}

/* A run of columns of one linear for all rows of a segment. */
INLINE void expand_task(const struct site *site, const int32_t *pages, int64_t num_pages, struct vectors of,
                        int64_t start, int64_t end, const float *h, int64_t h_row, int64_t h_page, void *y,
                        int64_t y_row, const int32_t *rows, int64_t num_rows, int type) {
    for (int64_t first = 0; first < num_rows; first += ROWS) {
        void *row[ROWS];
        int count = num_rows - first < ROWS ? (int)(num_rows - first) : ROWS;
        for (int r = 0; r < count; r++) row[r] = (void *)at(y, rows[first + r] * y_row, type);
        const float *h_part = h + first * h_row;
        int64_t n = start;
#define EXPAND(COUNT, VECTORS)                                                                                        \
    expand_block(site, pages, num_pages, of, n, h_part, h_row, h_page, row, COUNT, VECTORS, type)
        for (; n + ACROSS * LANES <= end; n += ACROSS * LANES) switch (count) {
            case 4: EXPAND(4, ACROSS); break;
            case 3: EXPAND(3, ACROSS); break;
            case 2: EXPAND(2, ACROSS); break;
            default: EXPAND(1, ACROSS);
            }
        for (; n + LANES <= end; n += LANES) switch (count) {
            case 4: EXPAND(4, 1); break;
            case 3: EXPAND(3, 1); break;
            case 2: EXPAND(2, 1); break;
            default: EXPAND(1, 1);
            }
#undef EXPAND
        expand_rest(site, pages, num_pages, of, n, end, h_part, h_row, h_page, row, count, type);
    }
}

/* Task numbers run over segments; this one's segment, and its number within it. */
INLINE int64_t segment_of(const int64_t *starts, int64_t task) {
    int64_t g = 0;
    while (starts[g + 1] <= task) g++;
    return g;
}

INLINE void add_lora(const struct site *site, const struct routing *routing, const void *x, int64_t x_row, void *y,
                     int64_t y_row, float *h, int num_threads, int type) {
    int64_t num_segments = routing->num_segments, num_linears = site->num_linears, k = site->num_inputs;
    int64_t h_row = num_linears * RANK_ROWS;
    int64_t shrink_starts[num_segments + 1], expand_starts[num_segments + 1], num_runs = 0;
    for (int64_t s = 0, start = 0; s < num_linears; start = site->ends[s++])
        num_runs += (site->ends[s] - start + COLUMNS - 1) / COLUMNS;
    shrink_starts[0] = expand_starts[0] = 0;
    for (int64_t g = 0; g < num_segments; g++) {
        int64_t num_pages = routing->page_starts[g + 1] - routing->page_starts[g];
        shrink_starts[g + 1] = shrink_starts[g] + num_pages * num_linears;
        expand_starts[g + 1] = expand_starts[g] + num_runs;
    }
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < shrink_starts[num_segments]; task++) {
            int64_t g = segment_of(shrink_starts, task), inner = task - shrink_starts[g];
            int64_t p = inner / num_linears, s = inner % num_linears;
            int64_t first = routing->row_starts[g], num_rows = routing->row_starts[g + 1] - first;
            int64_t page = routing->pages[routing->page_starts[g] + p];
            const void *a = at(site->a, page * site->a_page + s * RANK_ROWS * k, type);
            float *part = h + (routing->entry_starts[g] + p * num_rows) * h_row + s * RANK_ROWS;
            shrink_task(a, x, x_row, routing->rows + first, routing->scales + first, num_rows, part, h_row, k, type);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < expand_starts[num_segments]; task++) {
            int64_t g = segment_of(expand_starts, task), run = task - expand_starts[g], s = 0, start = 0;
            for (int64_t runs; run >= (runs = (site->ends[s] - start + COLUMNS - 1) / COLUMNS); start = site->ends[s++])
                run -= runs;
            start += run * COLUMNS;
            int64_t end = start + COLUMNS < site->ends[s] ? start + COLUMNS : site->ends[s];
            int64_t first = routing->row_starts[g], num_rows = routing->row_starts[g + 1] - first;
            int64_t first_page = routing->page_starts[g], num_pages = routing->page_starts[g + 1] - first_page;
            const float *part = h + routing->entry_starts[g] * h_row + s * RANK_ROWS;
            int64_t vector = routing->vectors[g] * site->num_outputs;
            struct vectors of = {NULL, NULL};
            if (routing->vectors[g] >= 0)
                of = (struct vectors){at(site->scale, vector, type), at(site->offset, vector, type)};
            expand_task(site, routing->pages + first_page, num_pages, of, start, end, part, h_row, num_rows * h_row, y,
                        y_row, routing->rows + first, num_rows, type);
        }
    }
}

/* x [T, K] and y [T, N], rows x_row and y_row elements apart, of the weights' type: 0 float32, 1 bfloat16. */
void manylora_add_lora(const struct site *site, const struct routing *routing, const void *x, int64_t x_row, void *y,
                       int64_t y_row, float *h, int64_t type, int64_t num_threads) {
    int threads = (int)num_threads;
    if (type == FLOAT32)
        add_lora(site, routing, x, x_row, y, y_row, h, threads, FLOAT32);
    else
        add_lora(site, routing, x, x_row, y, y_row, h, threads, BFLOAT16);
}
