/* Softmax cross-entropy over rows of fp32 logits, and their gradients. */
#include "gemm.h"

#define SPAN 1024 /* classes whose exponentials are summed in fp32 before fp64 takes over */

static float largest(const float *x, long count) {
    float top = -INFINITY;
    long i = 0;
    if (count >= LANES) {
        vec best = *(const vec *)x;
        for (i = LANES; i + LANES <= count; i += LANES) {
            vec next = *(const vec *)(x + i);
            best = choose(next > best, next, best);
        }
        for (int l = 0; l < LANES; l++) top = fmaxf(top, best[l]);
    }
    for (; i < count; i++) top = fmaxf(top, x[i]);
    return top;
}

/* In place: e^(x - top). Returns the sum. */
static double exponentials(float *x, long count, float top) {
    double sum = 0;
    for (long start = 0; start < count; start += SPAN) {
        long end = start + SPAN < count ? start + SPAN : count, i = start;
        vec part = all(0);
        for (; i + LANES <= end; i += LANES) {
            vec e = exp_of(*(vec *)(x + i) - top);
            *(vec *)(x + i) = e, part += e;
        }
        for (; i < end; i++) x[i] = exp_of(all(x[i] - top))[0], part[0] += x[i];
        sum += total(part);
    }
    return sum;
}

/* logits [rows, classes] are overwritten; losses [rows]: negative log-likelihood plus z_loss times
 * the squared logarithm of the sum. `gradients` of `type` may be the logits, or nothing. */
void zaya_loss(long rows, long classes, float *logits, const int64_t *targets, float z_loss,
               float *losses, void *gradients, long type, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long r = 0; r < rows; r++) {
        float *x = logits + r * classes;
        float top = largest(x, classes), chosen = x[targets[r]];
        double sum = exponentials(x, classes, top);
        float size = top + (float)log(sum);
        losses[r] = (float)(log(sum) + (double)(top - chosen)) + z_loss * size * size;
        if (!gradients) continue;
        float factor = (1 + 2 * z_loss * size) / (float)sum;
        float at = x[targets[r]] * factor - 1;
        char *to = (char *)gradients + r * classes * (type == BF16 ? 2 : 4);
        long i = 0;
        for (; i + LANES <= classes; i += LANES) store(to, type, i, *(vec *)(x + i) * factor);
        for (; i < classes; i++) put(to, type, i, x[i] * factor);
        put(to, type, targets[r], at);
    }
}
