/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Everything that is counted, once: the C side indexes the per-CPU array with it, the Python side
 * (tracer/record.py, class Counter) has the same names in the same order, and a test compares them.
 *
 * The accounts that must balance:
 *   opened + adopted + late_begin = closed + lost_ring + lost_connection_map + lost_end + excluded + (still open)
 */
#ifndef TRACER_COUNTERS_H
#define TRACER_COUNTERS_H

enum counter {
	COUNT_OPENED,		    /* connections that began: a local socket entered SYN_SENT */
	COUNT_ADOPTED,		    /* connections found at the start by the socket iterator */
	COUNT_CLOSED,		    /* closing records handed to the ring */
	COUNT_INTERIM,		    /* interim records handed to the ring */
	COUNT_EXCLUDED,		    /* dropped after it began: a loopback connection without a rewrite */
	COUNT_LOST_RING,	    /* LOST: closing records that found the ring full */
	COUNT_LOST_CONNECTION_MAP,  /* LOST: connections that found the connection map full */
	COUNT_LOST_TRANSLATION_MAP, /* LOST: translations that found the translation map full */
	COUNT_DEFERRED,		    /* interim records that found the ring full: the next row carries them */
	COUNT_LOST_END, /* LOST: closing records nobody made: the socket is gone or another's, its entry was still there */
	COUNT_LATE_BEGIN,    /* connections whose SYN_SENT was missed (tracer.c), taken at their next state */
	COUNT_LATE_END,	     /* connections whose CLOSE was missed (tracer.c), taken when the socket was destroyed */
	COUNT_UNRESOLVED,    /* closing records whose translation is unknown */
	COUNT_AMBIGUOUS,     /* joins refused: one tuple open in two namespaces, or in two zones */
	COUNT_AFTER_PAUSE,   /* connections that began while the tracer was stopping: in no row */
	COUNT_CONNTRACK_NEW, /* conntrack entries born while we listened */
	COUNT_CONNTRACK_DESTROY, /* conntrack entries that ended while we listened */
	COUNT_IGNORED_PROTOCOL,	 /* conntrack events of protocols that are not traced */
	COUNT_MALFORMED_EVENTS,	 /* conntrack events whose layout was not understood */
	COUNT_STALE_DESTROY,	 /* DESTROY of an entry that was not, or no longer, in the map */
	COUNT_KEPT,		 /* entries that conntrack dropped at once (a refusal), kept for the socket */
	COUNTERS
};

#endif
