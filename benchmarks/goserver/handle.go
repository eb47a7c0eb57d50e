package main

import (
	"encoding/binary"

	"benchserver/hpack"
)

// A window's share that is given back at once, lest each frame of a client's costs another.
const refill = receiveWindow / 4

// An inflow is a window that the client may fill, and what it has filled of it and was not given back.
type inflow struct{ left, owed int }

// take says how much is to be given back now.
func (f *inflow) take(n int) (int, error) {
	f.left -= n
	f.owed += n
	if f.left < 0 {
		return 0, violation{codeFlowControl, "more data than the window has room for"}
	}
	if f.owed < refill {
		return 0, nil
	}
	back := f.owed
	f.left, f.owed = f.left+back, 0
	return back, nil
}

// An arrival is a DATA frame of which something is still to come.
type arrival struct {
	stream *stream // nil if it is gone, or never was
	left   int
	last   bool
}

// check says whether there may be such a frame now.
func (c *conn) check(h header) error {
	if h.length > receiveFrame {
		return violation{codeFrameSize, "a frame longer than MAX_FRAME_SIZE"}
	}
	if c.unended.stream != 0 && (h.kind != frameContinuation || h.stream != c.unended.stream) {
		return violation{codeProtocol, "a header block was not ended"}
	}
	wrong := false
	switch h.kind {
	case frameSettings, framePing, frameGoAway:
		wrong = h.stream != 0
	case frameData, frameHeaders, frameReset, frameContinuation:
		wrong = h.stream == 0
	}
	if wrong {
		return violation{codeProtocol, "a frame where there can't be one of its type"}
	}
	return nil
}

func (c *conn) handle(h header, payload []byte) error {
	switch h.kind {
	case frameData:
		return c.data(h, payload)
	case frameHeaders:
		return c.headers(h, payload)
	case frameContinuation:
		return c.continuation(h, payload)
	case frameReset:
		if s := c.streams[h.stream]; s != nil {
			c.drop(s)
		}
		return nil
	case frameSettings:
		return c.settings(h, payload)
	case framePing:
		return c.ping(h, payload)
	case frameWindowUpdate:
		return c.windowUpdate(h, payload)
	case framePushPromise:
		return violation{codeProtocol, "clients don't push"}
	}
	return nil // After GOAWAY the client closes; priorities mean nothing here, and neither does what nobody knows.
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
	return c.give(s, len(payload))
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
		return n, c.give(a.stream, n)
	}
	c.arriving = nil
	if a.stream != nil && a.last {
		c.finish(a.stream)
	}
	return n, c.give(a.stream, n)
}

// give gives back what DATA has taken of the windows. A stream that ends needs none.
func (c *conn) give(s *stream, n int) error {
	back, err := c.receive.take(n)
	if back > 0 {
		c.control = appendValues(c.control, frameWindowUpdate, 0, uint32(back))
	}
	if err != nil || s == nil {
		return err
	}
	if back, err = s.receive.take(n); back > 0 && s.response.body == nil {
		c.control = appendValues(c.control, frameWindowUpdate, s.id, uint32(back))
	}
	return err
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

func (c *conn) ping(h header, payload []byte) error {
	if h.length != 8 {
		return violation{codeFrameSize, "a PING that is not one"}
	}
	if !h.has(flagAck) {
		c.control = appendHeader(c.control, header{8, framePing, flagAck, 0})
		c.control = append(c.control, payload...)
	}
	return nil
}

func (c *conn) settings(h header, payload []byte) error {
	if h.has(flagAck) {
		return nil
	}
	if h.length%6 != 0 {
		return violation{codeFrameSize, "half a setting"}
	}
	for ; len(payload) > 0; payload = payload[6:] {
		if err := c.setting(binary.BigEndian.Uint16(payload), binary.BigEndian.Uint32(payload[2:])); err != nil {
			return err
		}
	}
	c.control = appendHeader(c.control, header{0, frameSettings, flagAck, 0})
	return nil
}

func (c *conn) setting(name uint16, value uint32) error {
	switch name {
	case settingTableSize:
		c.encoder.SetMaxDynamicTableSize(value)
	case settingMaxFrame:
		if value < leastMaxFrame || value > mostMaxFrame {
			return violation{codeProtocol, "no such MAX_FRAME_SIZE"}
		}
		c.frame = int(value)
	case settingWindow:
		if value > greatestValue {
			return violation{codeFlowControl, "no such INITIAL_WINDOW_SIZE"}
		}
		difference := int(value) - c.initial
		c.initial = int(value)
		for _, s := range c.streams {
			if err := c.widen(s, difference); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *conn) windowUpdate(h header, payload []byte) error {
	if h.length != 4 {
		return violation{codeFrameSize, "a WINDOW_UPDATE that is not one"}
	}
	increment := int(binary.BigEndian.Uint32(payload) & greatestValue)
	if increment == 0 {
		return violation{codeProtocol, "a window grows by nothing"}
	}
	if s := c.streams[h.stream]; s != nil {
		return c.widen(s, increment)
	}
	if h.stream != 0 {
		if c.idle(h.stream) {
			return violation{codeProtocol, "a window of a stream that nobody has opened"}
		}
		return nil
	}
	if c.window += increment; c.window > greatestValue {
		return violation{codeFlowControl, "the connection's window is too large"}
	}
	if c.window > 0 {
		for _, s := range c.starved {
			c.line.join(s)
		}
		c.starved = c.starved[:0]
	}
	return nil
}

// widen changes a stream's window, by less than nothing if a setting has become smaller.
func (c *conn) widen(s *stream, by int) error {
	if s.window += by; s.window > greatestValue {
		return violation{codeFlowControl, "a stream's window is too large"}
	}
	if s.waiting && s.window > 0 {
		s.waiting = false
		c.line.join(s)
	}
	return nil
}
