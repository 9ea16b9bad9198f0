package audit

import (
	"testing"
	"time"
)

// tier1 is a record as a tier 1 request makes it.
func tier1() Record {
	return Record{
		Event: EventRelease, Decision: Granted, Tier: "service", Subject: "my-database", Names: []string{"my-database"},
		Epochs: []uint32{1}, Caller: &Caller{UID: 1001, Unit: "/system.slice/my-database.service", PID: 4711}, Rule: "service[3]",
		Policy: "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
	}
}

func BenchmarkAppendWritten(b *testing.B) { benchmarkAppend(b, Written, 1) }

func BenchmarkAppendWrittenParallel(b *testing.B) { benchmarkAppend(b, Written, 32) }

func BenchmarkAppendDurable(b *testing.B) { benchmarkAppend(b, Durable, 1) }

func BenchmarkAppendDurableParallel(b *testing.B) { benchmarkAppend(b, Durable, 32) }

func benchmarkAppend(b *testing.B, how Durability, parallel int) {
	l := openTest(b, newKeeper(b), nil)
	rec := tier1()
	b.ReportAllocs()
	if parallel == 1 {
		for b.Loop() {
			if _, err := l.Append(rec, how); err != nil {
				b.Fatal(err)
			}
		}
		return
	}
	b.SetParallelism(parallel)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := l.Append(rec, how); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	rec := tier1()
	rec.Time = time.Now()
	var line []byte
	b.ReportAllocs()
	for b.Loop() {
		line = rec.Encode(line[:0])
	}
	b.SetBytes(int64(len(line)))
}

func BenchmarkParse(b *testing.B) {
	rec := tier1()
	rec.Time = time.Now()
	line := rec.Encode(nil)
	b.SetBytes(int64(len(line)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(line); err != nil {
			b.Fatal(err)
		}
	}
}
