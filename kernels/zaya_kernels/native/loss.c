/* Softmax cross-entropy over rows of fp32 logits, and their gradients. */
#include "gemm.h"

#define SPAN 1024 /* classes whose exponentials are summed in fp32 before fp64 takes over */

static float largest(const float *x, long count) {
    vec best = all(-INFINITY), other = best;
    long i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        best = larger(*(const vec *)(x + i), best);
        other = larger(*(const vec *)(x + i + LANES), other);
    }
    float top = largest_of(larger(best, other));
    for (; i < count; i++) top = fmaxf(top, x[i]);
    return top;
}

/* Sum of e^(x - top). */
static double exponentials(const float *x, long count, float top) {
    double sum = 0;
    for (long start = 0; start < count; start += SPAN) {
        long end = start + SPAN < count ? start + SPAN : count, i = start;
        vec part = all(0);
        for (; i + LANES <= end; i += LANES) part += exp_of(*(const vec *)(x + i) - top);
        for (; i < end; i++) part[0] += exp_of(all(x[i] - top))[0];
        sum += total(part);
    }
    return sum;
}

/* losses [rows]: negative log-likelihood plus z_losses, z_loss times the squared logarithm of the
 * sum. `gradients` of `type` may be the logits, or nothing. Exponentials are taken twice: a row of
 * logits stays in the cache, and writing them would send all rows to memory once more. */
void zaya_loss(long rows, long classes, const float *logits, const int64_t *targets, float z_loss,
               float *losses, float *z_losses, void *gradients, long type, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long r = 0; r < rows; r++) {
        const float *x = logits + r * classes;
        float top = largest(x, classes), chosen = x[targets[r]];
        double sum = exponentials(x, classes, top);
        float size = top + (float)log(sum);
        z_losses[r] = z_loss * size * size;
        losses[r] = (float)(log(sum) + (double)(top - chosen)) + z_losses[r];
        if (!gradients) continue;
        float factor = (1 + 2 * z_loss * size) / (float)sum;
        char *to = (char *)gradients + r * classes * (type == BF16 ? 2 : 4);
        long i = 0;
        for (; i + LANES <= classes; i += LANES)
            store(to, type, i, exp_of(*(const vec *)(x + i) - top) * factor);
        for (; i < classes; i++) put(to, type, i, exp_of(all(x[i] - top))[0] * factor);
        put(to, type, targets[r], exp_of(all(chosen - top))[0] * factor - 1);
    }
}
