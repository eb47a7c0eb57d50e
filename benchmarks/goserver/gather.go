package main

import (
	"net"
	"sync"
)

// A gathered connection writes what was written to it meanwhile with one system call, as soon as the one before has
// returned. Frames and TLS records stay what they are, and nothing is held back: a server that flushes each event of a
// stream then spends its time on events, and not in the kernel.
type gathered struct {
	net.Conn
	lock    sync.Mutex
	changed sync.Cond
	waiting []byte
	spare   []byte
	err     error
}

// As much may wait before a writer has to.
const mostGathered = 256 << 10

type gatheringListener struct{ net.Listener }

func (l gatheringListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	g := &gathered{Conn: conn}
	g.changed.L = &g.lock
	go g.run()
	return g, nil
}

func (g *gathered) Write(data []byte) (int, error) {
	g.lock.Lock()
	defer g.lock.Unlock()
	for len(g.waiting) > mostGathered && g.err == nil {
		g.changed.Wait()
	}
	if g.err != nil {
		return 0, g.err
	}
	g.waiting = append(g.waiting, data...)
	g.changed.Broadcast()
	return len(data), nil
}

// Close lets what was written before go out first: it may be TLS's goodbye.
func (g *gathered) Close() error {
	g.lock.Lock()
	if g.err == nil {
		g.err = net.ErrClosed
	}
	g.changed.Broadcast()
	g.lock.Unlock()
	return nil
}

func (g *gathered) run() {
	defer g.Conn.Close()
	g.lock.Lock()
	defer g.lock.Unlock()
	for {
		for len(g.waiting) == 0 {
			if g.err != nil {
				return
			}
			g.changed.Wait()
		}
		batch := g.waiting
		g.waiting = g.spare[:0]
		g.changed.Broadcast()
		g.lock.Unlock()
		_, err := g.Conn.Write(batch)
		g.lock.Lock()
		g.spare = batch
		if err != nil {
			g.err = err
			g.changed.Broadcast()
			return
		}
	}
}
