package main

import (
	"bytes"
	"math/rand"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A response is what is sent for a request, in either version of HTTP.
type response struct {
	status      int
	contentType string
	length      int // -1: not known before
	body        body
	flushed     bool // each piece of the body goes out as it is made, in a frame and a TLS record of its own
}

// A body makes itself piece by piece.
type body interface {
	// next appends at most so many bytes, and says whether all has been sent then.
	next(out []byte, most int) ([]byte, bool)
	// pause is the time before the next piece.
	pause() time.Duration
}

// respond says what is answered to a request whose body has been read, and how much later.
func respond(method, target string, received int) (response, time.Duration) {
	path, rest, _ := strings.Cut(target, "?")
	q := query(rest)
	switch method + " " + path {
	case "POST /answer":
		body := document(max(q.number("size", 500), 20))
		return response{200, "application/json", len(body), &text{body}, false}, q.duration("wait")
	case "POST /sink":
		return plain(200, strconv.Itoa(received)), 0
	case "GET /bytes":
		size := q.number("size", 1<<20)
		return response{200, "application/octet-stream", size, &bulk{size}, false}, 0
	case "GET /events":
		interval := q.duration("interval")
		events := &events{count: q.number("count", 1), interval: interval, due: time.Now().Add(interval)}
		return response{200, "text/event-stream", -1, events, true}, 0
	}
	if method == "HEAD" {
		return plain(404, ""), 0
	}
	return plain(404, "404 page not found\n"), 0
}

func plain(status int, content string) response {
	return response{status, "text/plain; charset=utf-8", len(content), &text{[]byte(content)}, false}
}

// A query is searched as it is: no name or value here needs escaping.
type query string

func (q query) get(name string) string {
	for pair := range strings.SplitSeq(string(q), "&") {
		if key, value, _ := strings.Cut(pair, "="); key == name {
			return value
		}
	}
	return ""
}

func (q query) number(name string, fallback int) int {
	if n, err := strconv.Atoi(q.get(name)); err == nil && n >= 0 {
		return n
	}
	return fallback
}

func (q query) duration(name string) time.Duration {
	d, _ := time.ParseDuration(q.get(name))
	return d
}

var documents sync.Map

// document is JSON of so many bytes; the same for all who ask for it.
func document(size int) []byte {
	if made, ok := documents.Load(size); ok {
		return made.([]byte)
	}
	made := append(append([]byte(`{"text":"`), bytes.Repeat([]byte("x"), size-11)...), `"}`...)
	documents.Store(size, made)
	return made
}

type text struct{ left []byte }

func (t *text) next(out []byte, most int) ([]byte, bool) {
	n := min(most, len(t.left))
	out, t.left = append(out, t.left[:n]...), t.left[n:]
	return out, len(t.left) == 0
}

func (*text) pause() time.Duration { return 0 }

// As much of a large body as is made at once, in memory that stays in the cache.
const chunk = 64 << 10

var noise = make([]byte, chunk)

func init() { rand.New(rand.NewSource(1)).Read(noise) }

type bulk struct{ left int }

func (b *bulk) next(out []byte, most int) ([]byte, bool) {
	n := min(most, b.left, chunk)
	b.left -= n
	return append(out, noise[:n]...), b.left == 0
}

func (*bulk) pause() time.Duration { return 0 }

// events are Server-Sent Events, as tokens of a language model are; each says when it was sent.
type events struct {
	count    int
	interval time.Duration
	due      time.Time // of the next one
	made     int
	event    []byte
	left     []byte // of the last one, if a window has cut it
}

// next never tells that all was sent together with the last event, as nobody who flushes tokens knows which is the last.
func (e *events) next(out []byte, most int) ([]byte, bool) {
	if len(e.left) == 0 {
		if e.made == e.count {
			return out, true
		}
		if most > 0 {
			e.make()
		}
	}
	n := min(most, len(e.left))
	out, e.left = append(out, e.left[:n]...), e.left[n:]
	return out, false
}

func (e *events) make() {
	now := time.Now()
	if e.due.Before(now) {
		e.due = now
	}
	e.due = e.due.Add(e.interval)
	e.event = append(e.event[:0], `data: {"i":`...)
	e.event = strconv.AppendInt(e.event, int64(e.made), 10)
	e.event = append(e.event, `,"ns":`...)
	e.event = strconv.AppendInt(e.event, now.UnixNano(), 10)
	e.event = append(e.event, `,"delta":"token"}`+"\n\n"...)
	e.left = e.event
	e.made++
}

// Timers are no finer. Of events with shorter intervals some are sent one after the other, and then there is a pause.
const shortest = time.Millisecond

func (e *events) pause() time.Duration {
	if e.interval <= 0 || len(e.left) > 0 || e.made == e.count {
		return 0
	}
	if wait := time.Until(e.due); wait >= shortest {
		return wait
	}
	return 0
}
