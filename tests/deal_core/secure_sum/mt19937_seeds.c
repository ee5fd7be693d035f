/* Seeds of numpy's RandomState(seed) whose first words, taken from masked words, leave small numbers.
 *
 *   mt19937_seeds FIRST COUNT < targets > hits
 *
 * tries COUNT seeds from FIRST on. It reads, for each target, the least number that may be left,
 * how far above it numbers may be, and the first WORDS masked words. It writes, for each hit, the
 * place of the target and the seed. All numbers are modulo 2^32.
 *
 * The first output of the generator (Matsumoto and Nishimura's mt19937ar) needs words 0, 1 and 397
 * of its state, which 397 multiplications make from a seed; they are done for many seeds side by
 * side. Only where the first word fits, the others are looked at.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { WORDS = 8, SHIFT = 397, MOST_TARGETS = 8, LANES = 16, ROWS = 6, BLOCK = LANES * ROWS };
typedef uint32_t Lanes __attribute__((vector_size(4 * LANES)));
typedef struct { uint32_t least, span, words[WORDS]; } Target;

/* The word of a state that follows another; of numbers and of lanes. */
#define NEXT(state, place) (UINT32_C(1812433253) * ((state) ^ ((state) >> 30)) + (place))

/* An output, from the words of the state at its place, behind it, and SHIFT behind it. */
static inline uint32_t output(uint32_t here, uint32_t next, uint32_t far)
{
    uint32_t joined = (here & UINT32_C(0x80000000)) | (next & UINT32_C(0x7fffffff));
    uint32_t y = far ^ (joined >> 1) ^ (-(joined & 1) & UINT32_C(0x9908b0df));
    y ^= y >> 11;
    y ^= (y << 7) & UINT32_C(0x9d2c5680);
    y ^= (y << 15) & UINT32_C(0xefc60000);
    return y ^ (y >> 18);
}

static int small(const Target *target, int word, uint32_t mask)
{
    return target->words[word] - mask - target->least <= target->span;
}

/* Whether a seed leaves small numbers in all words of a target. */
static int fits(const Target *target, uint32_t seed)
{
    uint32_t state[SHIFT + WORDS] = {seed};
    for (uint32_t place = 1; place < SHIFT + WORDS; place++)
        state[place] = NEXT(state[place - 1], place);
    for (int word = 0; word < WORDS; word++)
        if (!small(target, word, output(state[word], state[word + 1], state[word + SHIFT])))
            return 0;
    return 1;
}

/* First outputs of BLOCK seeds in a row. */
static void first_outputs(uint32_t seed, uint32_t *words)
{
    Lanes state[ROWS], start[ROWS], second[ROWS];
    for (int row = 0; row < ROWS; row++)
        for (int lane = 0; lane < LANES; lane++)
            start[row][lane] = seed + row * LANES + lane;
    for (int row = 0; row < ROWS; row++)
        second[row] = state[row] = NEXT(start[row], 1);
    for (uint32_t place = 2; place <= SHIFT; place++)
        for (int row = 0; row < ROWS; row++)
            state[row] = NEXT(state[row], place);
    for (int row = 0; row < ROWS; row++)
        for (int lane = 0; lane < LANES; lane++)
            words[row * LANES + lane] = output(start[row][lane], second[row][lane], state[row][lane]);
}

static int read_targets(Target *targets)
{
    int number = 0;
    while (number < MOST_TARGETS && scanf("%" SCNu32, &targets[number].least) == 1) {
        Target *target = &targets[number++];
        int read = scanf("%" SCNu32, &target->span);
        for (int word = 0; word < WORDS; word++)
            read += scanf("%" SCNu32, &target->words[word]);
        if (read != 1 + WORDS) exit(2);
    }
    return number;
}

static void try_block(uint32_t seed, uint64_t seeds, const Target *targets, int number)
{
    uint32_t words[BLOCK];
    first_outputs(seed, words);
    for (int at = 0; at < number; at++)
        for (uint32_t place = 0; place < BLOCK && place < seeds; place++)
            if (small(&targets[at], 0, words[place]) && fits(&targets[at], seed + place))
                printf("%d %" PRIu32 "\n", at, seed + place);
}

int main(int argc, char **argv)
{
    Target targets[MOST_TARGETS];
    if (argc != 3) return 2;
    int number = read_targets(targets);
    uint64_t first = strtoull(argv[1], 0, 10), end = first + strtoull(argv[2], 0, 10);
    for (uint64_t seed = first; seed < end; seed += BLOCK)
        try_block((uint32_t)seed, end - seed, targets, number);
    return 0;
}
