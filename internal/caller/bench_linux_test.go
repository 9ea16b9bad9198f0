package caller

import (
	"net"
	"testing"

	"keybroker/internal/need"
)

func benchTCP(b *testing.B) (*Resolver, *net.TCPConn) {
	need.Root(b)
	l := listen(b, "tcp", "127.0.0.1:0")
	start(b, as(1001), nil, "dial tcp %s -", l.Addr())
	return newResolver(b), accept[*net.TCPConn](b, l)
}

func BenchmarkFromTCP(b *testing.B) {
	r, conn := benchTCP(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.FromTCP(conn); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStillTCP(b *testing.B) {
	r, conn := benchTCP(b)
	c, err := r.FromTCP(conn)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := c.Still(ctx); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkMatchUnitTCP(b *testing.B) {
	r, conn := benchTCP(b)
	c, err := r.FromTCP(conn)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		c.MatchUnit("/system.slice/x.service")
	}
}

func BenchmarkFromUnix(b *testing.B) {
	r, l := newResolver(b), listenUnix(b)
	start(b, nil, nil, "dial unix %s -", l.Addr())
	conn := accept[*net.UnixConn](b, l)
	b.ReportAllocs()
	for b.Loop() {
		c, err := r.FromUnix(conn)
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

func BenchmarkStillUnix(b *testing.B) {
	r, l := newResolver(b), listenUnix(b)
	start(b, nil, nil, "dial unix %s -", l.Addr())
	c, err := r.FromUnix(accept[*net.UnixConn](b, l))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	b.ReportAllocs()
	for b.Loop() {
		if err := c.Still(ctx); err != nil {
			b.Fatal(err)
		}
	}
}
