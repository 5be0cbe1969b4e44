-- KEYS[1] = state
-- ARGV[1] = fence, ARGV[2] = phase
redis.call('HSET', KEYS[1], 'phase', ARGV[2])
return {'OK'}
