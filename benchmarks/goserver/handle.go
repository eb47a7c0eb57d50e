package main

import "encoding/binary"

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
