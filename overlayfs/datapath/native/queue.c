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

void queue_push(struct queue *queue, const void *data, size_t length)
{
    struct packet *packet = malloc(sizeof *packet + length);
    if (!packet) {
        say("out of memory: a packet of %zu bytes is lost", length);
        return;
    }
    packet->next = NULL;
    packet->length = length;
    memcpy(packet->data, data, length);
    pthread_mutex_lock(&queue->mutex);
    *queue->end = packet;
    queue->end = &packet->next;
    pthread_cond_signal(&queue->filled);
    pthread_mutex_unlock(&queue->mutex);
}

struct packet *queue_pop(struct queue *queue)
{
    pthread_mutex_lock(&queue->mutex);
    while (!queue->first && !queue->closed)
        pthread_cond_wait(&queue->filled, &queue->mutex);
    struct packet *packet = queue->first;
    if (packet) {
        queue->first = packet->next;
        if (!queue->first)
            queue->end = &queue->first;
    }
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
