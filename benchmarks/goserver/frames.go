package main

import (
	"encoding/binary"
	"fmt"
)

// What RFC 9113 says of frames, as far as a server needs it.

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// The header before each frame's payload.
const headerSize = 9

const (
	frameData         = 0x0
	frameHeaders      = 0x1
	frameReset        = 0x3
	frameSettings     = 0x4
	framePushPromise  = 0x5
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindowUpdate = 0x8
	frameContinuation = 0x9
)

const (
	flagAck        = 0x1 // of SETTINGS and PING
	flagEndStream  = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

const (
	settingTableSize    = 0x1
	settingMaxStreams   = 0x3
	settingWindow       = 0x4
	settingMaxFrame     = 0x5
	settingMaxFields    = 0x6
	settingNoPriorities = 0x9 // RFC 9218
)

const (
	codeProtocol        = 0x1
	codeFlowControl     = 0x3
	codeStreamClosed    = 0x5
	codeFrameSize       = 0x6
	codeRefused         = 0x7
	codeCompression     = 0x9
	codeEnhanceYourCalm = 0xb
)

// What holds before SETTINGS say otherwise, and the greatest that they may say.
const (
	initialWindow = 65535
	greatestValue = 1<<31 - 1
	leastMaxFrame = 1 << 14
	mostMaxFrame  = 1<<24 - 1
)

// A violation is what ends a connection, with GOAWAY.
type violation struct {
	code   uint32
	reason string
}

func (v violation) Error() string { return fmt.Sprintf("%s (error %d)", v.reason, v.code) }

type header struct {
	length int
	kind   byte
	flags  byte
	stream uint32
}

func (h header) has(flag byte) bool { return h.flags&flag != 0 }

// padLength is the size of the field that says how much padding there is.
func (h header) padLength() int {
	if h.has(flagPadded) {
		return 1
	}
	return 0
}

func parseHeader(data []byte) header {
	length := int(data[0])<<16 | int(data[1])<<8 | int(data[2])
	return header{length, data[3], data[4], binary.BigEndian.Uint32(data[5:]) & greatestValue}
}

func appendHeader(out []byte, h header) []byte {
	out = append(out, byte(h.length>>16), byte(h.length>>8), byte(h.length), h.kind, h.flags)
	return binary.BigEndian.AppendUint32(out, h.stream)
}

// appendValues appends a frame whose payload is 32-bit numbers.
func appendValues(out []byte, kind byte, stream uint32, values ...uint32) []byte {
	out = appendHeader(out, header{4 * len(values), kind, 0, stream})
	for _, value := range values {
		out = binary.BigEndian.AppendUint32(out, value)
	}
	return out
}

type setting struct {
	name  uint16
	value uint32
}

func appendSettings(out []byte, settings ...setting) []byte {
	out = appendHeader(out, header{6 * len(settings), frameSettings, 0, 0})
	for _, s := range settings {
		out = binary.BigEndian.AppendUint16(out, s.name)
		out = binary.BigEndian.AppendUint32(out, s.value)
	}
	return out
}

// bare is the payload of HEADERS without padding and priority.
func bare(h header, payload []byte) ([]byte, error) {
	skip, padding := h.padLength(), 0
	if skip > 0 && len(payload) > 0 {
		padding = int(payload[0])
	}
	if h.has(flagPriority) {
		skip += 5
	}
	if skip+padding > len(payload) {
		return nil, violation{codeProtocol, "more padding than frame"}
	}
	return payload[skip : len(payload)-padding], nil
}
