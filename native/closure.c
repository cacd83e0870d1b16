#include "closure.h"

#include "hash.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { KEY_BYTES = 32 };

#define NO_ROW UINT32_MAX

/* Rows by parent key: buckets of linked rows. Children of one parent are neighbours in a chain
 * only if no other parent shares the bucket, hence the comparison in adopt(). */
struct children {
    uint32_t *buckets;
    uint32_t *next;
    size_t mask;
    uint64_t seed; /* random: keys that all fall into one bucket cannot be prepared */
    const struct kvfs_hash_ops *ops;
};

static size_t bucket_of(const struct children *children, const uint8_t *key)
{
    return (size_t)children->ops->hash64(key, KEY_BYTES, children->seed) & children->mask;
}

static void fill(struct children *children, const uint8_t *parents, size_t count)
{
    static const uint8_t no_parent[KEY_BYTES];
    memset(children->buckets, 0xff, (children->mask + 1) * sizeof *children->buckets);
    for (size_t row = 0; row < count; row++) {
        const uint8_t *parent = parents + row * KEY_BYTES;
        if (memcmp(parent, no_parent, KEY_BYTES) == 0)
            continue;
        uint32_t *bucket = &children->buckets[bucket_of(children, parent)];
        children->next[row] = *bucket;
        *bucket = (uint32_t)row;
    }
}

/* Take the children of key out of their chain and push those not yet dropped on the stack.
 * Taking them out keeps the whole linear when many rows have the same key. */
static size_t adopt(struct children *children, const uint8_t *key, const uint8_t *parents,
                    uint8_t *dropped, uint32_t *stack, size_t depth)
{
    uint32_t *link = &children->buckets[bucket_of(children, key)];
    while (*link != NO_ROW) {
        uint32_t row = *link;
        if (memcmp(parents + (size_t)row * KEY_BYTES, key, KEY_BYTES) != 0) {
            link = &children->next[row];
            continue;
        }
        *link = children->next[row];
        if (dropped[row])
            continue; /* on the stack already, or done */
        dropped[row] = 1;
        stack[depth++] = row;
    }
    return depth;
}

int64_t kvfs_closure(const uint8_t *keys, const uint8_t *parents, uint8_t *dropped, size_t count)
{
    size_t buckets = 16;
    while (buckets < count)
        buckets *= 2;
    struct children children = {.mask = buckets - 1, .ops = kvfs_hash_ops()};
    if (getrandom(&children.seed, sizeof children.seed, GRND_NONBLOCK) < 0)
        children.seed = (uintptr_t)&children;
    children.buckets = malloc(buckets * sizeof *children.buckets);
    children.next = malloc((count + 1) * sizeof *children.next);
    uint32_t *stack = malloc((count + 1) * sizeof *stack);
    int64_t total = -ENOMEM;
    if (children.buckets != NULL && children.next != NULL && stack != NULL) {
        fill(&children, parents, count);
        size_t depth = 0;
        for (size_t row = 0; row < count; row++)
            if (dropped[row])
                stack[depth++] = (uint32_t)row;
        total = (int64_t)depth;
        while (depth > 0) {
            const uint8_t *key = keys + (size_t)stack[--depth] * KEY_BYTES;
            size_t before = depth;
            depth = adopt(&children, key, parents, dropped, stack, depth);
            total += (int64_t)(depth - before);
        }
    }
    free(children.buckets);
    free(children.next);
    free(stack);
    return total;
}
