// SPDX-License-Identifier: Apache-2.0
/* Copies of packets for a thread of its own, first in, first out. What stands in it when the server is
 * killed is lost: requests are sent again by the kernel, and notifications are only hints. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "datapath.h"

struct queue {
    pthread_mutex_t mutex;
    pthread_cond_t filled;
    struct packet *first;
    struct packet **end;
    _Atomic size_t length;
    bool closed;
};

struct queue *queue_new(void)
{
    struct queue *queue = calloc(1, sizeof *queue);
    if (!queue)
        return NULL;
    pthread_mutex_init(&queue->mutex, NULL);
    pthread_cond_init(&queue->filled, NULL);
    queue->end = &queue->first;
    return queue;
}

bool queue_push(struct queue *queue, const void *data, size_t length)
{
    struct packet *packet = malloc(sizeof *packet + length);
    if (!packet)
        return false;
    packet->next = NULL;
    packet->length = length;
    memcpy(packet->data, data, length);
    pthread_mutex_lock(&queue->mutex);
    *queue->end = packet;
    queue->end = &packet->next;
    atomic_fetch_add(&queue->length, 1);
    pthread_cond_signal(&queue->filled);
    pthread_mutex_unlock(&queue->mutex);
    return true;
}

static struct packet *take(struct queue *queue)
{
    struct packet *packet = queue->first;
    if (packet) {
        queue->first = packet->next;
        if (!queue->first)
            queue->end = &queue->first;
        atomic_fetch_sub(&queue->length, 1);
    }
    return packet;
}

struct packet *queue_pop(struct queue *queue)
{
    pthread_mutex_lock(&queue->mutex);
    while (!queue->first && !queue->closed)
        pthread_cond_wait(&queue->filled, &queue->mutex);
    struct packet *packet = take(queue);
    pthread_mutex_unlock(&queue->mutex);
    return packet;
}

bool queue_is_empty(const struct queue *queue)
{
    return atomic_load(&queue->length) == 0;
}

struct packet *queue_take(struct queue *queue)
{
    /* Asked before every request: no lock where there is nothing. */
    if (queue_is_empty(queue))
        return NULL;
    pthread_mutex_lock(&queue->mutex);
    struct packet *packet = take(queue);
    pthread_mutex_unlock(&queue->mutex);
    return packet;
}

void queue_close(struct queue *queue)
{
    pthread_mutex_lock(&queue->mutex);
    queue->closed = true;
    pthread_cond_broadcast(&queue->filled);
    pthread_mutex_unlock(&queue->mutex);
}
