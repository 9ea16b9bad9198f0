package derive

import (
	"context"
	"testing"
)

func BenchmarkSchedule(b *testing.B) {
	s := testSchedule(b, 0)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := s.ServiceKey("my-database", 1, 32); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
}

// 32 callers for each processor.
func BenchmarkHolder(b *testing.B) {
	h := testHolder(b, testPage(b, testMaster(b, 0)))
	ctx := context.Background()
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := h.ServiceKey(ctx, 1, "my-database", 1, 32); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
}

// One caller that waits for each answer.
func BenchmarkHolderAlone(b *testing.B) {
	h := testHolder(b, testPage(b, testMaster(b, 0)))
	ctx := context.Background()
	for b.Loop() {
		if _, err := h.ServiceKey(ctx, 1, "my-database", 1, 32); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHolderSign(b *testing.B) {
	h := testHolder(b, testPage(b, testMaster(b, 0)))
	ctx := context.Background()
	for b.Loop() {
		if _, err := h.Sign(ctx, LabelRelease, make([]byte, 64), make([]byte, 1120), make([]byte, 512)); err != nil {
			b.Fatal(err)
		}
	}
}
