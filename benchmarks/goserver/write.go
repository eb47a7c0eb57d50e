package main

import (
	"bytes"
	"net/http"
	"strconv"
	"time"

	"benchserver/hpack"
)

// About as much is made before it is written. Small answers wait for no more of the large ones than that and what the
// kernel has taken already.
const batch = 64 << 10

// A line is where streams wait for their turn to send one frame.
type line struct{ first, latest *stream }

func (l *line) join(s *stream) {
	if l.first == nil {
		l.first = s
	} else {
		l.latest.behind = s
	}
	l.latest = s
}

// next is the stream whose turn it is, if any.
func (l *line) next() *stream {
	for s := l.first; s != nil; s = l.first {
		l.first, s.behind = s.behind, nil
		if !s.gone {
			return s
		}
	}
	return nil
}

// later puts a stream in line, after a while.
func (c *conn) later(s *stream, wait time.Duration) {
	if wait <= 0 {
		c.line.join(s)
		return
	}
	s.timer = time.AfterFunc(wait, func() {
		c.lock.Lock()
		defer c.lock.Unlock()
		if !s.gone {
			c.line.join(s)
			c.work.Signal()
		}
	})
}

// output is what the writer has made, and needs for making it.
type output struct {
	encoder *hpack.Encoder
	fields  bytes.Buffer
	out     []byte
	cuts    []int // where a TLS record has to end
	date    string
	dated   int64
}

func (c *conn) write() {
	c.lock.Lock()
	defer c.lock.Unlock()
	for {
		for len(c.control) == 0 && c.line.first == nil && !c.ending {
			c.work.Wait()
		}
		c.fill()
		if len(c.out) == 0 && c.ending {
			return
		}
		more := c.line.first != nil
		c.lock.Unlock()
		err := c.send()
		if more {
			c.wire.nudge()
		}
		c.lock.Lock()
		if err != nil {
			c.wire.Conn.Close() // which ends the reader
			return
		}
	}
}

// fill makes a batch of frames: those of the protocol, then one of each stream in turn.
func (c *conn) fill() {
	c.out, c.cuts = append(c.out[:0], c.control...), c.cuts[:0]
	c.control = c.control[:0]
	for len(c.out) < batch {
		s := c.line.next()
		if s == nil {
			return
		}
		c.turn(s)
	}
}

func (c *conn) turn(s *stream) {
	if !s.begun {
		s.begun = true
		c.begin(s)
		if pause := s.response.body.pause(); pause > 0 {
			c.later(s, pause)
			return
		}
	}
	c.cut(s)
	start := len(c.out)
	c.out = appendHeader(c.out, header{kind: frameData, stream: s.id})
	out, done := s.response.body.next(c.out, max(0, min(c.frame, chunk, s.window, c.window)))
	size := len(out) - start - headerSize
	if size == 0 && !done {
		c.out = out[:start]
		c.park(s)
		return
	}
	c.out = out
	flags := byte(0)
	if done {
		flags = flagEndStream
	}
	appendHeader(out[:start], header{size, frameData, flags, s.id})
	c.cut(s)
	s.window -= size
	c.window -= size
	if done {
		c.drop(s)
	} else {
		c.later(s, s.response.body.pause())
	}
}

// park keeps a stream that may send nothing until a window opens.
func (c *conn) park(s *stream) {
	if c.window > 0 {
		s.waiting = true
	} else {
		c.starved = append(c.starved, s)
	}
}

// begin sends a response's header block, of the fields that net/http would send, in its order.
func (c *conn) begin(s *stream) {
	c.fields.Reset()
	c.encode(":status", strconv.Itoa(s.response.status))
	c.encode("content-type", s.response.contentType)
	if s.response.length >= 0 {
		c.encode("content-length", strconv.Itoa(s.response.length))
	}
	if now := time.Now(); now.Unix() != c.dated {
		c.date, c.dated = now.UTC().Format(http.TimeFormat), now.Unix()
	}
	c.encode("date", c.date)
	c.cut(s)
	c.out = appendHeader(c.out, header{c.fields.Len(), frameHeaders, flagEndHeaders, s.id})
	c.out = append(c.out, c.fields.Bytes()...)
	c.cut(s)
}

func (c *conn) encode(name, value string) {
	c.encoder.WriteField(hpack.HeaderField{Name: name, Value: value})
}

// cut ends a TLS record here if the response is one whose pieces go out singly.
func (c *conn) cut(s *stream) {
	if s.response.flushed {
		c.cuts = append(c.cuts, len(c.out))
	}
}

// send encrypts the batch, and writes it with one system call.
func (c *conn) send() error {
	c.wire.hold()
	start := 0
	for _, cut := range append(c.cuts, len(c.out)) {
		if cut > start {
			if _, err := c.tls.Write(c.out[start:cut]); err != nil {
				return err
			}
			start = cut
		}
	}
	return c.wire.release()
}
