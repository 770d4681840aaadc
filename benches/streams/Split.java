// One topic split into two by Kafka Streams, exactly once; benches/streams/run.sh runs it.
//
//   java -cp 'JARS/*' Split.java BOOTSTRAP SOURCE STABLE CANARY WEIGHT_BP THREADS STATE_DIR
//
// A record goes to CANARY where a hash of its key, or of its partition and offset where it has none, is below WEIGHT_BP of 10000, else to
// STABLE; with its key, value, headers, timestamp and partition. Says `Split: running` on standard error once it does; runs until SIGTERM,
// and ends with 1 where Streams gives up.

import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Comparator;
import java.util.Optional;
import java.util.Properties;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Utils;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.kstream.Branched;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.processor.StreamPartitioner;
import org.apache.kafka.streams.processor.api.ContextualFixedKeyProcessor;
import org.apache.kafka.streams.processor.api.FixedKeyRecord;

public class Split {
    /** A value, and what only its record's context knows of it: the sinks' partitioner sees key and value, and no context. */
    record Placed(byte[] value, int partition, boolean canary) {}

    /** Places each record. */
    static final class Place extends ContextualFixedKeyProcessor<byte[], byte[], Placed> {
        private final int weight;

        Place(int weight) {
            this.weight = weight;
        }

        @Override
        public void process(FixedKeyRecord<byte[], byte[]> record) {
            var from = context().recordMetadata().orElseThrow();
            long unmixed = record.key() != null ? Utils.murmur2(record.key()) : (long) from.partition() << 48 ^ from.offset();
            boolean canary = Long.remainderUnsigned(mix(unmixed), 10_000) < weight;
            context().forward(record.withValue(new Placed(record.value(), from.partition(), canary)));
        }
    }

    /** MurmurHash3's last step. Producers place keys by murmur2 too: unmixed, a partition's keys would share a remainder. */
    static long mix(long hash) {
        hash = (hash ^ hash >>> 33) * 0xff51afd7ed558ccdL;
        hash = (hash ^ hash >>> 33) * 0xc4ceb9fe1a85ec53L;
        return hash ^ hash >>> 33;
    }

    static Optional<Set<Integer>> samePartition(String topic, byte[] key, Placed placed, int partitions) {
        if (placed.partition >= partitions) {
            throw new IllegalStateException(topic + " has " + partitions + " partitions, expected as many as the source has");
        }
        return Optional.of(Set.of(placed.partition));
    }

    static Properties config(String[] args) {
        var config = new Properties();
        config.put(StreamsConfig.APPLICATION_ID_CONFIG, "streams-split-" + args[1]);
        config.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, args[0]);
        config.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
        config.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 100);
        config.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, Integer.parseInt(args[5]));
        config.put(StreamsConfig.STATE_DIR_CONFIG, args[6]);
        config.put(StreamsConfig.consumerPrefix(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG), "earliest");
        return config;
    }

    public static void main(String[] args) throws Exception {
        if (args.length != 7) {
            System.err.println("Split: found " + args.length + " arguments, expected 7: see the head of Split.java");
            System.exit(2);
        }
        int weight = Integer.parseInt(args[4]);
        if (weight < 0 || weight > 10_000) {
            System.err.println("Split: WEIGHT_BP is " + weight + ", expected 0 to 10000");
            System.exit(2);
        }
        var builder = new StreamsBuilder();
        Serde<Placed> serde = Serdes.serdeFrom(
            (topic, placed) -> placed.value,
            (topic, bytes) -> { throw new UnsupportedOperationException("a placed value is only written"); });
        StreamPartitioner<byte[], Placed> partitioner = Split::samePartition;
        var to = Produced.with(Serdes.ByteArray(), serde, partitioner);
        builder.stream(args[1], Consumed.with(Serdes.ByteArray(), Serdes.ByteArray()))
            .processValues(() -> new Place(weight))
            .split()
            .branch((key, placed) -> placed.canary, Branched.withConsumer(canary -> canary.to(args[3], to)))
            .defaultBranch(Branched.withConsumer(stable -> stable.to(args[2], to)));

        var failed = new CountDownLatch(1);
        var streams = new KafkaStreams(builder.build(), config(args));
        streams.setUncaughtExceptionHandler(error -> StreamThreadExceptionResponse.SHUTDOWN_CLIENT);
        streams.setStateListener((now, before) -> {
            if (now == KafkaStreams.State.RUNNING) System.err.println("Split: running");
            if (now == KafkaStreams.State.ERROR) failed.countDown();
        });
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            streams.close(Duration.ofSeconds(10));
            remove(Path.of(args[6]));
        }));
        streams.start();
        failed.await();
        System.exit(1);
    }

    static void remove(Path directory) {
        if (!Files.exists(directory)) return;
        try (var paths = Files.walk(directory)) {
            for (var path : paths.sorted(Comparator.reverseOrder()).toList()) Files.delete(path);
        } catch (java.io.IOException error) {
            System.err.println("Split: " + directory + " stays: " + error);
        }
    }
}
