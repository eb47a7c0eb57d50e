package main

import "benchserver/hpack"

// Windows are given back as net/http does it, since to read these frames is a good part of what an upload takes of a
// client: where a frame of the client's ends, unless that is too little, and within a long one after so much.
const (
	leastRefill = 4 << 10
	refill      = 256 << 10
)

// An inflow is a window that the client may fill, and what it has filled of it and was not given back.
type inflow struct{ left, owed int }

func (f *inflow) take(n int) error {
	f.left -= n
	f.owed += n
	if f.left < 0 {
		return violation{codeFlowControl, "more data than the window has room for"}
	}
	return nil
}

func (f *inflow) giveBack() uint32 {
	back := f.owed
	f.left, f.owed = f.left+back, 0
	return uint32(back)
}

// An arrival is a DATA frame of which something is still to come.
type arrival struct {
	stream *stream // nil if it is gone, or never was
	left   int
	last   bool
}

func (c *conn) data(h header, payload []byte) error {
	padding := 0
	if h.has(flagPadded) {
		padding = 1 + int(payload[0])
	}
	if padding > h.length {
		return violation{codeProtocol, "more padding than frame"}
	}
	s := c.streams[h.stream]
	if s == nil && c.idle(h.stream) {
		return violation{codeProtocol, "data on a stream that nobody has opened"}
	}
	if s != nil && s.response.body != nil {
		c.reset(h.stream, codeStreamClosed)
		s = nil
	}
	if s != nil {
		s.received += h.length - padding
	}
	c.arriving = &arrival{s, h.length - len(payload), h.has(flagEndStream)}
	return c.give(s, len(payload), leastRefill)
}

// arrived takes as much of a DATA frame as there is, if that is what comes.
func (c *conn) arrived(available int) (int, error) {
	a := c.arriving
	if a == nil {
		return 0, nil
	}
	n := min(a.left, available)
	a.left -= n
	if a.left > 0 {
		return n, c.give(a.stream, n, refill)
	}
	c.arriving = nil
	if a.stream != nil && a.last {
		c.finish(a.stream)
	}
	return n, c.give(a.stream, n, leastRefill)
}

// give gives back what DATA has taken of the windows, if that is enough for one: of both, as they go out together then.
// A stream that has ended needs none.
func (c *conn) give(s *stream, n int, enough int) error {
	if err := c.receive.take(n); err != nil {
		return err
	}
	due := c.receive.owed >= enough
	if s != nil {
		if err := s.receive.take(n); err != nil {
			return err
		}
		due = due || s.receive.owed >= enough
	}
	if !due {
		return nil
	}
	c.control = appendValues(c.control, frameWindowUpdate, 0, c.receive.giveBack())
	if s != nil && s.response.body == nil {
		c.control = appendValues(c.control, frameWindowUpdate, s.id, s.receive.giveBack())
	}
	return nil
}

func (c *conn) headers(h header, payload []byte) error {
	payload, err := bare(h, payload)
	if err != nil {
		return err
	}
	if h.has(flagEndHeaders) {
		return c.ask(h, payload)
	}
	c.unended, c.block = h, append(c.block[:0], payload...)
	return nil
}

func (c *conn) continuation(h header, payload []byte) error {
	if c.unended.stream == 0 {
		return violation{codeProtocol, "there is no header block to go on with"}
	}
	c.block = append(c.block, payload...)
	if len(c.block) > receiveFields {
		return violation{codeEnhanceYourCalm, "an endless header block"}
	}
	if !h.has(flagEndHeaders) {
		return nil
	}
	first := c.unended
	c.unended = header{}
	return c.ask(first, c.block)
}

// field takes what a header block says. The rest of it matters to no endpoint.
func (c *conn) field(f hpack.HeaderField) {
	switch f.Name {
	case ":method":
		c.asked.method = f.Value
	case ":path":
		c.asked.target = f.Value
	}
}

// ask opens a stream, or ends one that has trailers. Whatever becomes of it, the block is decoded, as the next ones
// may refer to it.
func (c *conn) ask(h header, block []byte) error {
	c.asked = request{}
	_, err := c.decoder.Write(block)
	if err == nil {
		err = c.decoder.Close()
	}
	if err != nil {
		return violation{codeCompression, err.Error()}
	}
	s := c.streams[h.stream]
	switch {
	case s != nil && (!h.has(flagEndStream) || s.response.body != nil):
		c.reset(s.id, codeProtocol)
	case s != nil:
		c.finish(s)
	case c.idle(h.stream):
		return c.openStream(h)
	}
	return nil
}

func (c *conn) openStream(h header) error {
	if h.stream%2 == 0 {
		return violation{codeProtocol, "clients' streams are odd"}
	}
	c.last = h.stream
	if len(c.streams) >= c.most {
		c.reset(h.stream, codeRefused)
		return nil
	}
	if c.asked.method == "" || c.asked.target == "" {
		c.reset(h.stream, codeProtocol)
		return nil
	}
	s := &stream{id: h.stream, request: c.asked, receive: inflow{left: receiveWindow}, window: c.initial}
	c.streams[s.id] = s
	requests.Add(1)
	if h.has(flagEndStream) {
		c.finish(s)
	}
	return nil
}

func (c *conn) idle(id uint32) bool { return id > c.last }

// finish answers a request that has ended.
func (c *conn) finish(s *stream) {
	response, wait := respond(s.request.method, s.request.target, s.received)
	s.response = response
	c.later(s, wait)
}

// reset ends a stream before its time.
func (c *conn) reset(id uint32, code uint32) {
	c.control = appendValues(c.control, frameReset, id, code)
	if s := c.streams[id]; s != nil {
		c.drop(s)
	}
}

func (c *conn) drop(s *stream) {
	delete(c.streams, s.id)
	s.gone = true
	if s.timer != nil {
		s.timer.Stop()
	}
}
